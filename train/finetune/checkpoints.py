"""Checkpoints of a fine-tuning run: what trains, its optimizer, and where the data stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from kvjax.checks import check_finite
from train.finetune.step import TuneState

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints under a run's folder; written in the background, whole or not at all."""

    def __init__(self, run: Path, keep: int):
        """Opens them.

        Args:
            keep: how many are kept, the newest.
        """
        self._directory = (run / FOLDER).absolute()
        self._directory.mkdir(parents=True, exist_ok=True)
        newest: Any = ocp.training.preservation_policies.LatestN(keep)
        self._orbax = ocp.training.Checkpointer(
            str(self._directory),
            preservation_policy=newest,
            cleanup_tmp_directories=True,
        )

    def steps(self) -> list[int]:
        """Steps that there are finished checkpoints of, in order."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def save(self, step: int, state: TuneState, data: dict[str, Any]) -> None:
        """Starts writing a checkpoint; waits for the one before.

        Args:
            data: what is needed to go on besides arrays; JSON.

        Raises:
            ValueError: this one, or the one before, could not be written; names the last good one.
        """
        try:
            self._orbax.save_async(step, state, force=True, custom_metadata=data)
        except (OSError, ValueError) as error:
            raise self._not_written(error) from error

    def wait(self) -> None:
        """Until all is written.

        Raises:
            ValueError: see `save`.
        """
        try:
            self._orbax.wait()
        except (OSError, ValueError) as error:
            raise self._not_written(error) from error

    def _not_written(self, error: Exception) -> ValueError:
        # A full disk is an OSError of orbax's, or a ValueError of tensorstore's.
        steps = self._finished_on_disk()
        last = f"step {steps[-1]}" if steps else "none"
        return ValueError(
            f"cannot write a checkpoint to {self._directory}: {error}; the last good one: {last}"
        )

    def _finished_on_disk(self) -> list[int]:
        # orbax renames a folder to its step's number when all of it is written.
        return sorted(int(p.name) for p in self._directory.iterdir() if p.name.isdigit())

    def load_newest(self, like: TuneState) -> tuple[int, TuneState, dict[str, Any]]:
        """(step, state, data) of the newest one.

        Args:
            like: a state of the same shapes, dtypes and shardings.

        Raises:
            ValueError: it holds other parameters, or NaN; says which.
        """
        step = self.steps()[-1]
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        metadata: Any = self._orbax.metadata(step)
        self._check(step, metadata.metadata, like)
        loaded: Any = self._orbax.load(step, state)
        reason = "; remove this folder to continue from the checkpoint before it"
        check_finite(loaded, f"{self._directory / str(step)}: ", reason)
        return step, loaded, metadata.custom_metadata

    def _check(self, step: int, found: Any, like: TuneState) -> None:
        stored = {path: tuple(leaf.shape) for path, leaf in found["params"].items()}
        expected = {k: tuple(v.shape) for k, v in like.params.items()}
        if stored != expected:
            different = sorted(stored.items() ^ expected.items())[:4]
            raise ValueError(
                f"{self._directory / str(step)} trained other parameters than this run would: "
                f"{different}; give another folder, or the run's own settings"
            )

    def close(self) -> None:
        """Waits and lets go of the folder."""
        self.wait()
        self._orbax.close()
