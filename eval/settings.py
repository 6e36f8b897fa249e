"""How a task is run, apart from the task: the model's side of the command line."""

from __future__ import annotations

from dataclasses import dataclass

from eval import checks

KINDS = {
    "batch_size": checks.whole(1),
    "max_length": checks.whole(2),
    "temperature": checks.number(0),
    "top_p": checks.Kind("above 0 and ≤ 1", lambda p: checks.number(0, 1).fits(p) and p > 0),
    "top_k": checks.whole(0),
    "seed": checks.whole(0),
}
PROTOCOLS = ("generate", "teacher", "after")


@dataclass(frozen=True)
class Settings:
    """What predictions depend on besides model and task.

    Attributes:
        policies: names and settings, as in `kvjax.generate`.
        protocol: "generate": greedy or sampled answers, scored by the task. "teacher": the right
            answer is fed through the compressed cache and counts if every token of it, and the
            end, is the most likely one; "after": the same, with the question asked after the
            compression. Each batch of prompts is read once for all policies.
        chat: prompts inside the tokenizer's chat template.
        batch_size: prompts at a time.
        max_length: tokens of prompt and answer; None for the model's context.
        temperature, top_p, top_k: see `kvjax.generate`.
        seed: of sampled answers.
    """

    policies: tuple[str, ...] = ("full",)
    protocol: str = "generate"
    chat: bool = False
    batch_size: int = 8
    max_length: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self):
        checks.check(
            KINDS,
            batch_size=self.batch_size,
            max_length=self.max_length,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
        )
        if self.protocol not in PROTOCOLS:
            raise ValueError(
                f"protocol is {self.protocol!r}, expected one of {', '.join(PROTOCOLS)}"
            )
        if not self.policies:
            raise ValueError("got no policies, expected at least one")
        if len(set(self.policies)) < len(self.policies):
            raise ValueError(f"policies are {', '.join(self.policies)}, expected each once")
        if self.protocol != "generate" and (self.chat or self.temperature):
            raise ValueError(
                f"protocol {self.protocol!r} feeds the right answer after the raw prompt, "
                "expected no chat template and temperature 0"
            )
        if not self.temperature and (self.top_p < 1 or self.top_k):
            raise ValueError(
                f"top_p is {self.top_p} and top_k is {self.top_k} at temperature 0, which takes "
                "the most likely token: expected a temperature above 0, or neither"
            )
