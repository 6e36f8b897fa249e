"""Prompts in the manner of RULER (arXiv 2404.06654), of an exact length in tokens.

The kinds of questions, their numbers of keys, values, hops and words, and how answers are judged
are the paper's; sentences and instructions are this project's own, so that results compare policies
and models here, but are not the paper's numbers.
"""
