"""How good an answer is: scores over token ids, used by importance, tasks and evaluation."""

from collections import Counter
from collections.abc import Sequence


def exact_match(prediction: Sequence[int], answer: Sequence[int]) -> float:
    """1 if every token is right and there is no other, else 0."""
    return float(list(prediction) == list(answer))


def token_f1(prediction: Sequence[int], answer: Sequence[int]) -> float:
    """Harmonic mean of precision and recall of the tokens, order ignored (SQuAD's F1)."""
    common = _common(prediction, answer)
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)


def rouge1_recall(prediction: Sequence[int], answer: Sequence[int]) -> float:
    """Share of the answer's tokens that the prediction has, order ignored."""
    return _common(prediction, answer) / len(answer) if answer else 0.0


def _common(prediction, answer) -> int:
    return sum((Counter(prediction) & Counter(answer)).values())
