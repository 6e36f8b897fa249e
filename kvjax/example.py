"""One question about a long prompt. Tasks generate it; importance and evaluation use it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A prompt, its answer, and the place of the answer in the prompt.

    Attributes:
        prompt: token ids, the question at the end.
        answer: token ids that should follow.
        span: half-open range of prompt positions of the sentence that holds the answer;
            empty if unknown.
        depth: place of that sentence, 0 (start) to 1 (end).
        name: the kind of question.
        question_length: tokens of the question at the end of the prompt, with the beginning of the
            answer; 0 if unknown.
        answers: the answer as texts, several where the question asks for several; () if unknown.
        then_eos: whether the end-of-sequence token must follow the answer where it is judged.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    span: tuple[int, int] = (0, 0)
    depth: float = 0.0
    name: str = "needle"
    question_length: int = 0
    answers: tuple[str, ...] = ()
    then_eos: bool = True
