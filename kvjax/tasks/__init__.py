"""Synthetic tasks: long prompts with questions, short problems, and the scores of answers.

`needle`, `two_hop` and `repeated_spans` are tasks of long prompts: `generate` takes a numpy
Generator and a vocabulary, and returns an `Example`, token ids and spans. The generators of short
problems, in `word_problems` and `programs`, return a `Problem`: a text and a judge of its answers.
"""

from kvjax.scoring import accuracy, perplexity, predictions
from kvjax.tasks import families, programs, word_problems
from kvjax.tasks.prompt import Problem
from kvjax.tasks.recall import make_examples, needle, repeated_spans, two_hop
from kvjax.tasks.words import Vocabulary, WordVocabulary
from kvjax.text import exact_match, rouge1_recall, token_f1

__all__ = [
    "Problem",
    "Vocabulary",
    "WordVocabulary",
    "accuracy",
    "exact_match",
    "families",
    "make_examples",
    "needle",
    "perplexity",
    "predictions",
    "programs",
    "repeated_spans",
    "rouge1_recall",
    "token_f1",
    "two_hop",
    "word_problems",
]
