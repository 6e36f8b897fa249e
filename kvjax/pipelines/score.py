"""Head importance of a checkpoint, measured on examples that are generated for its tokenizer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.example import Example
from kvjax.headkv.importance import score_examples
from kvjax.headkv.scores import HeadScores
from kvjax.hf import load, load_tokenizer
from kvjax.nn import Transformer
from kvjax.tasks import needle, two_hop

TASKS = {
    "retrieval": needle.generate,
    "enhanced_retrieval": needle.generate,
    "retrieval_reasoning": two_hop.generate,
}
"""What each estimator of the HeadKV paper asks (arXiv 2410.19258, section 3.1)."""

LENGTHS = 4  # prompt lengths of the grid, evenly up to the longest


@dataclass(frozen=True)
class TokenizerVocabulary:
    """A transformers tokenizer as the vocabulary of the tasks."""

    tokenizer: Any

    @property
    def bos_id(self) -> int | None:
        """The token that starts a prompt, if the tokenizer has one."""
        return self.tokenizer.bos_token_id

    @property
    def size(self) -> int:
        """V."""
        return len(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of text as it stands within a sentence: after a space."""
        return self.tokenizer.encode(f" {text}", add_special_tokens=False)


def score_heads(
    model: Transformer,
    params: Any,
    tokenizer: Any,
    estimator: str = "retrieval_reasoning",
    samples: int = 64,
    length: int = 512,
    seed: int = 0,
    batch_size: int = 8,
) -> HeadScores:
    """Importance of every query head, from examples in the model's own tokens.

    Args:
        tokenizer: from `kvjax.load_tokenizer`.
        estimator: "retrieval", "retrieval_reasoning" or "enhanced_retrieval".
        samples: examples; those that the model answers wrongly do not count.
        length: longest prompt in tokens; a quarter of the samples each at 1/4, 2/4, 3/4 and all
            of it, depths evenly from start to end.
        batch_size: examples at a time.

    Raises:
        ValueError: an unknown estimator, a length that cannot hold the facts, or no example that
            the model answers.
    """
    examples = make_examples(tokenizer, estimator, samples, length, seed)
    scores = score_examples(model, params, examples, estimator=estimator, batch_size=batch_size)
    meta = scores.meta | {"model": Path(model.config.source).name, "seed": seed}
    return HeadScores(scores.samples, meta)


def make_examples(
    tokenizer: Any, estimator: str, samples: int, length: int, seed: int
) -> list[Example]:
    """The grid of lengths and depths that `score_heads` asks."""
    if estimator not in TASKS:
        raise ValueError(f"estimator is {estimator!r}, expected one of {', '.join(TASKS)}")
    if samples < 1:
        raise ValueError(f"got {samples} samples, expected ≥ 1")
    vocab = TokenizerVocabulary(tokenizer)
    rng = np.random.default_rng(seed)
    lengths = [length * (i + 1) // LENGTHS for i in range(LENGTHS)]
    depths = np.linspace(0.0, 1.0, samples)
    return [
        TASKS[estimator](rng, vocab, lengths[i % LENGTHS], distractors=i % 3, depth=float(depth))
        for i, depth in enumerate(depths)
    ]


def score_checkpoint(
    path: str, out: Path, estimator: str, samples: int, length: int, seed: int, dtype: str
) -> dict[str, Any]:
    """Scores the checkpoint at `path` and writes the score file `out`.

    Returns:
        estimator, examples accepted and asked, the most important head, seconds.
    """
    start = time.monotonic()
    model, params = load(path, dtype=dtype)
    scores = score_heads(model, params, load_tokenizer(path), estimator, samples, length, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    scores.save(out)
    layer, head = np.unravel_index(int(scores.mean.argmax()), scores.mean.shape)
    return {
        "estimator": estimator,
        "accepted": scores.samples.shape[2],
        "asked": samples,
        "best_head": f"layer {layer} head {head}",
        "best_score": round(float(scores.mean.max()), 4),
        "seconds": round(time.monotonic() - start, 1),
    }
