"""Settings of a comparison of GQA and MLA: arms that start as the same function, and their runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Len

from kvjax import transmla
from kvjax.checks import COUNT, Range
from kvjax.config import RopeConfig
from kvjax.fields import Count, OneOf, Positive, Share, build, check_fields
from kvjax.nn import Transformer
from kvjax.tasks.families import FAMILIES
from kvjax.text_files import read_yaml
from kvjax.transmla.inits import Factors, Init, identity


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune the same model.

    Attributes:
        init: of the conversion `equal_cache`, a name or a function; None: the model stays GQA.
        train: patterns of parameters that train, see `trainable_paths`.
    """

    init: str | Init | None
    train: tuple[str, ...]

    def convert(self, model: Transformer, params: dict[str, Any]) -> tuple[Transformer, Any]:
        """The model of this arm; its logits are those of the original."""
        if self.init is None:
            return model, params
        return transmla.convert(model, params, "equal_cache", init=self.init)


def dense_identity(weight: np.ndarray, repeats: int, rope: RopeConfig | None) -> Factors:
    """The init `identity` as one dense matrix: the zeros between KV heads are parameters too."""
    return identity(weight, repeats, rope).wide()


QO = ("kv_only", "layers_*/attn/q", "layers_*/attn/o")
UP = ("layers_*/attn/k_up", "layers_*/attn/v_up")

ARMS = {
    "gqa": Arm(None, ("kv_only",)),
    # The control: where K·H = D, as in the embedded model, W_Q and W_O have as many parameters as
    # the up-projections that the conversion adds.
    "gqa_matched": Arm(None, QO),
    "mla_svd_global": Arm("svd_global", ("kv_only",)),
    # As the authors' released scripts train: the cached latents stay those of the original.
    "mla_svd_global_up": Arm("svd_global", UP),
    "mla_svd_per_head": Arm("svd_per_head", ("kv_only",)),
    "mla_identity": Arm(dense_identity, ("kv_only",)),
}
"""GQA and MLA as TransMLA compares them and as its scripts train, other inits, and a control with
as many parameters."""


Arms = Annotated[tuple[Annotated[str, OneOf(tuple(ARMS))], ...], Len(1)]
Families = Annotated[tuple[Annotated[str, OneOf(tuple(FAMILIES))], ...], Len(1)]


@dataclass(frozen=True)
class CompareConfig:
    """GQA and MLA, fine-tuned alike: the comparison of TransMLA v1 and v2 (arXiv 2502.07864).

    The settings follow an article about these versions, not the papers themselves. All arms train
    K and V, the MLA arms their down- and up-projections; but `mla_svd_global_up` trains the
    up-projections only, as the authors' released scripts do (there with 128 sequences a step and
    one epoch).

    For every arm, runs of one seed and a quarter of the steps choose the rate from `rates` by the
    loss on held-out problems. Then `seeds` runs follow at that rate and at `paper_rate`. All arms
    see the same batches in the same order.

    Attributes:
        model: checkpoint with the project's word vocabulary.
        families: of `kvjax.tasks.families`, mixed in equal parts.
        rows: number of training problems of each family.
        problems: number of test problems of each family; answers to them are generated.
        paper_rate: TransMLA's learning rate, the same in the article and in the scripts.
        eval_every: number of steps between two held-out losses.
        eval_rows: number of held-out problems of each family.
    """

    model: str = "builtin:needle"
    families: Families = (
        "word_problems",
        "programs",
    )
    arms: Arms = tuple(ARMS)
    rows: Count = 20_000
    problems: Count = 200
    steps: Annotated[int, Range(least=4, most=COUNT.most, whole=True)] = 300
    batch_size: Count = 16
    sequence_length: Annotated[int, Range(least=2, most=COUNT.most, whole=True)] = 128
    rates: Annotated[tuple[Positive, ...], Len(1)] = (1e-3, 3e-3, 1e-2, 3e-2)
    paper_rate: Positive = 2e-5
    seeds: Count = 3
    warmup: Share = 0.03
    eval_every: Count = 20
    eval_rows: Count = 100

    def __post_init__(self) -> None:
        check_fields(self)


def read_compare(path: Path | None, **changes: Any) -> CompareConfig:
    """Reads the settings from a YAML file; None: the defaults.

    Raises:
        ValueError: not a YAML file, a key without an attribute, or a bad value.
    """
    if path is None:
        return CompareConfig(**changes)
    return build(CompareConfig, {**read_yaml(path, "train"), **changes}, str(path))


@dataclass(frozen=True)
class Job:
    """One training run of the comparison.

    Attributes:
        arm: name in ARMS.
        rate: peak learning rate.
        seed: of the order of the data.
        steps: number of steps.
        search: the run only helps to choose the rate; no answers are generated.
    """

    arm: str
    rate: float
    seed: int
    steps: int
    search: bool

    @property
    def name(self) -> str:
        """The name of the run's file."""
        kind = "search" if self.search else f"seed{self.seed}"
        return f"{self.arm}-{self.rate:g}-{kind}"


def search_jobs(config: CompareConfig, arm: str) -> list[Job]:
    """The short runs that choose an arm's rate."""
    # A seed that the reported runs don't use: choosing and reporting see different orders of data.
    return [Job(arm, rate, config.seeds, config.steps // 4, True) for rate in config.rates]


def final_jobs(config: CompareConfig, arm: str, best: float) -> list[Job]:
    """The runs that are reported: all seeds at the best rate and at the paper's rate."""
    rates = dict.fromkeys((best, config.paper_rate))
    return [Job(arm, rate, s, config.steps, False) for rate in rates for s in range(config.seeds)]
