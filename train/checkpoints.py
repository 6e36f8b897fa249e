"""Checkpoints of a run: one folder per step, which appears only when it is complete."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from kvjax import processes
from kvjax.checks import check_finite
from kvjax.endings import say

FOLDER, DAMAGED = "checkpoints", "damaged"
"""Folders inside a run's folder: of good checkpoints, and of those that could not be read."""


def finished_steps(run: Path) -> list[int]:
    """Steps with a finished checkpoint, in ascending order; reads the names of folders only."""
    # Orbax writes under a temporary name and renames the folder to the step's number at the end.
    return sorted(int(path.name) for path in (run / FOLDER).glob("*") if path.name.isdigit())


class Checkpoints:
    """The checkpoints of one run. Orbax writes them in the background."""

    def __init__(self, run: Path, keep: int):
        """Opens the folder, which is made if it is missing.

        Args:
            run: the run's folder.
            keep: number of checkpoints to keep; older ones are deleted.
        """
        self._run, self._directory = run, (run / FOLDER).absolute()
        self._directory.mkdir(parents=True, exist_ok=True)
        self._keep, self._orbax = keep, self._open(keep)

    def _open(self, keep: int) -> Any:
        newest: Any = ocp.training.preservation_policies.LatestN(keep)
        return ocp.training.Checkpointer(
            str(self._directory),
            preservation_policy=newest,
            cleanup_tmp_directories=True,
        )

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, in ascending order."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Waits for the previous checkpoint and starts to write this one.

        Args:
            step: number of steps taken.
            state: a pytree of arrays.
            data: JSON values that resuming needs besides the arrays.

        Raises:
            ValueError: this checkpoint or the previous one could not be written; the message names
                the last good one.
        """
        try:
            self._orbax.save_async(step, state, force=True, custom_metadata=data)
        except (OSError, ValueError) as error:
            raise self._not_written(error) from error

    def wait(self) -> None:
        """Waits until everything is written.

        Raises:
            ValueError: see `save`.
        """
        try:
            self._orbax.wait()
        except (OSError, ValueError) as error:
            raise self._not_written(error) from error

    def _not_written(self, error: Exception) -> ValueError:
        # On a full disk orbax raises OSError and tensorstore ValueError.
        steps = finished_steps(self._run)
        last = f"step {steps[-1]}" if steps else "none"
        return ValueError(
            f"cannot write a checkpoint to {self._directory}: {error}; the last good one: {last}"
        )

    def load_newest(self, like: Any) -> tuple[int, Any, dict[str, Any]]:
        """Loads the newest checkpoint that can be read, as (step, state, data).

        Damaged ones that are newer move to the folder `DAMAGED`, with a line on standard error.
        Several processes could disagree about the damage, so they refuse it.

        Args:
            like: a state with the shapes, dtypes and shardings of the stored one.

        Raises:
            ValueError: the checkpoint has other parameters, some of which the message names; or no
                checkpoint can be read.
        """
        damaged: dict[int, _Unreadable] = {}
        for step in reversed(self.steps()):
            try:
                found = self._load(step, like)
            except _Unreadable as error:
                damaged[step] = error
                if processes.several():
                    break
                continue
            self._set_aside(damaged, step)
            return found
        newest, error = next(iter(damaged.items()))
        raise ValueError(f"{self._directory / str(newest)} is a damaged checkpoint: {error}")

    def _set_aside(self, steps: Iterable[int], good: int) -> None:
        """Moves damaged checkpoints out of the folder, where they would be in the way."""
        for step in steps:
            place, aside = self._directory / str(step), self._run / DAMAGED / str(step)
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            self._orbax.close()
            place.rename(aside)
            self._orbax = self._open(self._keep)
            say(f"{place} is damaged, moved to {aside}: the run continues from step {good}")

    def _load(self, step: int, like: Any) -> tuple[int, Any, dict[str, Any]]:
        # Compare shapes before loading, to name the parameters that differ.
        with _damage():
            metadata: Any = self._orbax.metadata(step)
            found, data = metadata.metadata, dict(metadata.custom_metadata)
            if found is None:  # orbax has only logged what is wrong with it
                raise ValueError("the shapes of its arrays cannot be read")
        self._check_parameters(step, found, like)
        with _damage():
            return step, self._orbax.load(step, jax.tree.map(_abstract, like)), data

    def check_finite(self, step: int, state: Any) -> None:
        """Raises ValueError where the state of a checkpoint holds NaN; names folder and array."""
        reason = "; remove this folder to continue from the checkpoint before it"
        check_finite(state, f"{self._directory / str(step)}: ", reason)

    def _check_parameters(self, step: int, found: Any, like: Any) -> None:
        stored, expected = _parameter_shapes(found), _parameter_shapes(like)
        if stored != expected:
            different = sorted(stored.items() ^ expected.items())[:4]
            raise ValueError(
                f"{self._directory / str(step)} trained other parameters than this run would: "
                f"{different}; give another folder, or the run's own settings"
            )

    def close(self) -> None:
        """Waits until everything is written, and closes the folder."""
        self.wait()
        self._orbax.close()


class _Unreadable(Exception):
    """A checkpoint that orbax cannot read."""


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # orbax, tensorstore and their readers of JSON share no class
        raise _Unreadable(f"{type(error).__name__}: {error}".splitlines()[0][:200]) from None


def _abstract(leaf: Any) -> Any:
    """An array's shape, dtype and sharding; orbax takes plain numbers as they are."""
    if not isinstance(leaf, jax.Array):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _parameter_shapes(state: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the leaves under `params`, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    named = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves
    ]
    return {
        name.removeprefix("params/"): tuple(leaf.shape)
        for name, leaf in named
        if name.startswith("params/")
    }
