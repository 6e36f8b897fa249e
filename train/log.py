"""The log metrics.jsonl of a run, utilisation of the devices, and the curves of fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvjax.extras import import_extra, pyplot
from kvjax.fields import Number, Size, object_problems, or_null, refuse
from kvjax.runs import whole_lines, write_picture, write_whole
from kvjax.text_files import parse_object

LINE = {"step": Size}
REST: dict[str, Any] = dict.fromkeys(("loss", "divergence", "learning_rate"), or_null(Number))
"""Fields of a line that kvjax reads."""
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
"""Peak FLOP/s of one device in bf16 without sparsity, from data sheets."""


def utilisation(flops: float, seconds: float, device_kind: str) -> float | None:
    """FLOP/s divided by the device's peak in bf16 (MFU); None where the peak is unknown.

    Args:
        flops: of all steps in these seconds on one device, counted by the compiler. The count
            includes what rematerialisation computes twice; the body of a loop (slices of logits,
            tiles of attention) is counted once.
        seconds: time of these steps.
        device_kind: `jax.Device.device_kind`.
    """
    # Kinds are prefixes of each other ("TPU v5", "TPU v5 lite"): the longest match counts.
    known = [kind for kind in PEAK_FLOPS if device_kind.startswith(kind)]
    if not known or not seconds:
        return None
    return flops / seconds / PEAK_FLOPS[max(known, key=len)]


def truncate(path: Path, step: int) -> None:
    """Drops the lines of steps after `step`, which will be taken again, and a torn last line."""
    kept = [json.dumps(line) for line in read(path) if line["step"] <= step]
    write_whole(path, "".join(line + "\n" for line in kept))


def tensorboard(out: Path, line: dict[str, Any]) -> None:
    """Adds one line of the log to the event files under `out`/tensorboard.

    Raises:
        ValueError: the package tensorboardX is missing.
    """
    package = import_extra("tensorboardX", "tensorboard")
    with package.SummaryWriter(str(out / "tensorboard")) as writer:
        for name, value in line.items():
            if name != "step" and value is not None:
                writer.add_scalar(name, value, line["step"])


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without a last line that a kill tore.

    Raises:
        ValueError: another damaged line; or a value that is not of its type.
    """
    lines = [parse_object(x, f"{path}, line {i}") for i, x in enumerate(whole_lines(path), 1)]
    for number, line in enumerate(lines, 1):
        refuse(object_problems(line, LINE, optional=REST), f"{path}, line {number}")
    return lines


def plot(path: Path, out: Path) -> None:
    """Draws loss and learning rate over the steps into a PNG."""
    lines = read(path)
    if not lines:
        return
    plt = pyplot()
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(7, 5), sharex=True, layout="constrained", height_ratios=(3, 1)
    )
    steps = [line["step"] for line in lines]
    top.plot(steps, [line["loss"] for line in lines], label="cross-entropy")
    if any(line["divergence"] for line in lines):
        top.plot(steps, [line["divergence"] for line in lines], label="KL to the teacher")
    top.set(ylabel="nats a learned token")
    top.legend()
    bottom.plot(steps, [line["learning_rate"] for line in lines], color="0.4")
    bottom.set(xlabel="step", ylabel="learning rate")
    write_picture(out, figure, dpi=110)
