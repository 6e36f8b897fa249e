"""One question about a long prompt: what tasks generate, importance reads and evaluation scores."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A prompt, its answer, and where in the prompt the answer stands.

    Attributes:
        prompt: token ids, the question at the end.
        answer: token ids that should follow.
        span: half-open range of prompt positions of the sentence that holds the answer;
            empty where that is unknown.
        depth: where the sentence stands, 0 (start) to 1 (end).
        name: the kind of question.
        question_length: tokens at the end of the prompt that ask, 0 where that is unknown.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    span: tuple[int, int] = (0, 0)
    depth: float = 0.0
    name: str = "needle"
    question_length: int = 0
