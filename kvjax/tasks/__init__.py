"""Questions about long prompts that the project writes itself, and the scores of their answers.

Every generator takes a numpy Generator and a vocabulary and returns an `Example`: ids and spans.
"""

from kvjax.answers import exact_match, rouge1_recall, token_f1
from kvjax.tasks import needle, repeated_spans, two_hop
from kvjax.tasks.perplexity import perplexity
from kvjax.tasks.sets import make_examples
from kvjax.tasks.teacher_forced import accuracy, predictions
from kvjax.tasks.vocabulary import Vocabulary, WordVocabulary

__all__ = [
    "Vocabulary",
    "WordVocabulary",
    "accuracy",
    "exact_match",
    "make_examples",
    "needle",
    "perplexity",
    "predictions",
    "repeated_spans",
    "rouge1_recall",
    "token_f1",
    "two_hop",
]
