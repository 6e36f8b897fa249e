"""metrics.jsonl of a run, and the pictures of fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# bf16 peak of one chip or card, FLOP/s, from the makers' data sheets; without sparsity.
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


def utilisation(flops: float, seconds: float, device_kind: str) -> float | None:
    """FLOP/s over the devices' bf16 peak (MFU); None where the peak is unknown.

    Args:
        flops: of all steps in these seconds on one device, by the compiler's count: it has what
            rematerialisation computes twice, and a loop's body (logits, tiles of attention) once.
    """
    known = [kind for kind in PEAK_FLOPS if device_kind.startswith(kind)]
    if not known or not seconds:
        return None
    return flops / seconds / PEAK_FLOPS[max(known, key=len)]


def truncate(path: Path, step: int) -> None:
    """Drops the lines after `step`: those steps are taken again. A torn last line goes too."""
    kept = [json.dumps(line) for line in read(path) if line["step"] <= step]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in kept))


def append(path: Path, line: dict[str, Any]) -> None:
    """Adds one line."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def tensorboard(out: Path, line: dict[str, Any]) -> None:
    """Adds one line to the event files under `out`/tensorboard.

    Raises:
        ValueError: the package tensorboardX is missing.
    """
    try:
        from tensorboardX import SummaryWriter  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError("--tensorboard needs the package: pip install tensorboardX") from None
    with SummaryWriter(str(out / "tensorboard")) as writer:
        for name, value in line.items():
            if name != "step" and value is not None:
                writer.add_scalar(name, value, line["step"])


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that was torn by a kill, which can only be the last, is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def plot(path: Path, out: Path) -> None:
    """Loss and learning rate over the steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read(path)
    if not lines:
        return
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
    figure.savefig(out, dpi=110)
    plt.close(figure)
