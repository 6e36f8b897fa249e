"""Checkpoints of a run: one folder a step, the newest two kept."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax
import orbax.checkpoint.experimental.v1 as ocp

from kvjax.checks import check_finite
from train.step import TrainState

KEPT = 2


@dataclass(frozen=True)
class Progress:
    """Where a run stands: steps taken in all, the stage, steps taken in it, tokens seen."""

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    tokens: int = 0


def steps(run: Path) -> list[int]:
    """Steps that there are finished checkpoints of, in order; orbax renames when all is written."""
    return sorted(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit())


def save(run: Path, state: TrainState, progress: Progress) -> None:
    """Writes a checkpoint and removes those that are no longer needed."""
    content = {"state": state, "progress": dataclasses.asdict(progress)}
    ocp.save(_path(run, progress.step), content, overwrite=True)
    for step in steps(run)[:-KEPT]:
        shutil.rmtree(_path(run, step))


def load_newest(run: Path, like: TrainState) -> tuple[TrainState, Progress]:
    """The newest checkpoint.

    Args:
        like: a state of the same shapes and dtypes.

    Raises:
        ValueError: there is none, or it holds NaN.
    """
    if not steps(run):
        raise ValueError(f"{run} has no checkpoint")
    abstract = {
        "state": jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        ),
        "progress": dataclasses.asdict(Progress()),
    }
    path = _path(run, steps(run)[-1])
    content = ocp.load(path, abstract)
    reason = "; remove this folder to continue from the checkpoint before it"
    check_finite(content["state"], f"{path}: ", reason)
    progress = {name: int(value) for name, value in content["progress"].items()}
    return content["state"], Progress(**progress)


def _path(run: Path, step: int) -> str:
    return str((run / "checkpoints" / str(step)).absolute())
