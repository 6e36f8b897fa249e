"""Evaluation through the real compressed cache: `python -m eval TASK --model … --policy …`."""
