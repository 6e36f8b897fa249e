"""Prompts in the manner of RULER; `eval.tasks.ruler` is the task."""
