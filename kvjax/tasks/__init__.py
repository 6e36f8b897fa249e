"""Questions about long prompts that the project writes itself, and the scores of their answers.

Every generator takes a numpy Generator and a vocabulary and returns an `Example`: ids and spans.
Those of short problems, `word_problems` and `programs`, return a `Problem`: text and its judge.
"""

from kvjax.tasks import families, needle, programs, repeated_spans, two_hop, word_problems
from kvjax.tasks.perplexity import perplexity
from kvjax.tasks.problem import Problem
from kvjax.tasks.sets import make_examples
from kvjax.tasks.teacher_forced import accuracy, predictions
from kvjax.tasks.vocabulary import Vocabulary, WordVocabulary
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
