"""Settings of a comparison of GQA and MLA: arms that start as the same function, and their runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Len

from kvjax import transmla
from kvjax.checks import COUNT, Range
from kvjax.config import GQAConfig, RopeConfig, of_kind
from kvjax.fields import Count, OneOf, Positive, Share, build, check_fields
from kvjax.nn import Transformer
from kvjax.paths import local_path
from kvjax.tasks.families import FAMILIES
from kvjax.text_files import read_yaml
from kvjax.transmla.inits import Factors, Init, identity
from train.data import SourceConfig
from train.finetune.config import parse_source


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune the same model.

    Attributes:
        init: of the conversion `equal_cache`, a name or a function; None: the model stays GQA.
        train: patterns of parameters that train, see `trainable_paths`.
        matched: also trains W_Q and W_O of some layers, see `matching`.
    """

    init: str | Init | None
    train: tuple[str, ...]
    matched: bool = False

    def patterns(self, model: Transformer) -> tuple[str, ...]:
        """All patterns of parameters that train in this model."""
        return (*self.train, *(matching(model) if self.matched else ()))

    def convert(self, model: Transformer, params: dict[str, Any]) -> tuple[Transformer, Any]:
        """The model of this arm; its logits are those of the original."""
        if self.init is None:
            return model, params
        return transmla.convert(model, params, "equal_cache", init=self.init)


def dense_identity(weight: np.ndarray, repeats: int, rope: RopeConfig | None) -> Factors:
    """The init `identity` as one dense matrix: the zeros between KV heads are parameters too."""
    return identity(weight, repeats, rope).wide()


def matching(model: Transformer) -> list[str]:
    """The W_Q and W_O, spread over the layers, that have as many parameters as the up-projections
    which the conversion adds. Where K·H = D, as in the embedded model, these are all of them."""
    bases = [of_kind(layer.attention, GQAConfig) for layer in model.config.layers]
    wide = sum(a.num_heads * a.head_dim * a.num_kv_heads * a.head_dim for a in bases)
    one = sum(a.num_heads * a.head_dim for a in bases) / len(bases) * model.config.hidden_size
    names = [f"layers_{i}/attn/{name}" for i in range(len(bases)) for name in ("q", "o")]
    count = min(round(2 * wide / one), len(names))
    return [names[number * len(names) // count] for number in range(count)]


UP = ("layers_*/attn/k_up", "layers_*/attn/v_up")

ARMS = {
    "gqa": Arm(None, ("kv_only",)),
    "gqa_matched": Arm(None, ("kv_only",), matched=True),
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
        model: a checkpoint; without `data`, one with the project's word vocabulary.
        data, held_out: sources as in `train.finetune.config.TuneConfig`, FORMAT:PATH[@WEIGHT], such
            as "gsm8k:train.jsonl.gz"; no answers are generated. Without them:
        families: of `kvjax.tasks.families`, mixed in equal parts.
        rows: number of training problems of each family, or most rows of each source.
        problems: number of test problems of each family; answers to them are generated.
        paper_rate: TransMLA's learning rate, the same in the article and in the scripts; None for
            no runs at this rate.
        eval_every: number of steps between two held-out losses.
        eval_rows: number of held-out problems of each family, or rows of each source.
    """

    model: str = "builtin:needle"
    data: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
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
    paper_rate: Positive | None = 2e-5
    seeds: Count = 3
    warmup: Share = 0.03
    eval_every: Count = 20
    eval_rows: Count = 100

    def __post_init__(self) -> None:
        check_fields(self)
        if bool(self.data) != bool(self.held_out):
            got = "data" if self.data else "held_out"
            raise ValueError(f"got only {got}, expected both data and held_out, or neither")
        for texts in (self.data, self.held_out):
            if len(set(texts)) < len(texts):
                raise ValueError(f"got a source twice in {', '.join(texts)}, expected each once")
            for text in texts:
                local_path(parse_source(text).path, "data")

    def sources(self, split: str, folder: Path) -> dict[str, SourceConfig]:
        """Sources by their names in tables.

        Args:
            split: "train" or "validation".
            folder: where the problems of the families are.
        """
        if not self.data:
            files = {family: folder / f"{family}-{split}.jsonl" for family in self.families}
            return {name: SourceConfig(str(file), "plain") for name, file in files.items()}
        texts = self.data if split == "train" else self.held_out
        short = [text.rpartition("/")[2] for text in texts]
        # Files of one name in several folders have their whole texts as names.
        names = short if len(set(short)) == len(short) else texts
        return dict(zip(names, map(parse_source, texts), strict=True))


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
    rates = dict.fromkeys(rate for rate in (best, config.paper_rate) if rate is not None)
    return [Job(arm, rate, s, config.steps, False) for rate in rates for s in range(config.seeds)]
