"""The tensors of a GGUF file as parameters: names and axes, quantized blocks, rows put in order.

Tensors are read through `kvjax.hf.weights`, as those of safetensors are. A tensor of plain numbers
is a view of the mapped file. A quantized one becomes numbers when it is opened, in pieces and in
the dtype of the parameters, so that no copy of it in float32 exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kvjax.checkpoint_files import Checkpoint, StoredTensor, collapsed
from kvjax.config import GQAConfig, ModelConfig
from kvjax.fields import refuse, within
from kvjax.hf.config import config_from_hf
from kvjax.hf.gguf.architectures import Architecture, architecture, hf_config
from kvjax.hf.gguf.header import Header, Place, read_header
from kvjax.hf.gguf.rope import FACTORS, LONG, SHORT
from kvjax.hf.layout import Layout, Rule
from kvjax.hf.weights import WEIGHT_DTYPES, LazyParams, open_checkpoint
from kvjax.nn import Transformer

PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
"""Kinds of tensors that hold numbers, not blocks."""
PIECE_NUMBERS = 1 << 18
"""Numbers to dequantize at a time: their temporary arrays stay in the processor's cache."""

Change = Callable[[np.ndarray], np.ndarray]


def read_config(path: Path) -> ModelConfig:
    """The configuration of the model in a GGUF file.

    Raises:
        ValueError: the file is damaged, or it has a model that kvjax does not compute.
    """
    header = read_header(path)
    with within(header.path):
        return config_from_hf(hf_config(header))


def open_params(
    model: Transformer, path: Path, dtype: np.dtype, shardings: Any = None
) -> LazyParams:
    """The parameters in a GGUF file, each part read when it is accessed.

    Args:
        dtype, shardings: see `kvjax.hf.weights.read_params`.

    Raises:
        ValueError: names every missing, unexpected or misshapen tensor, and all that are quantized
            in a way that the gguf package cannot read.
    """
    header = read_header(path)
    checkpoint = _checkpoint(header, dtype, _changes(model.config, architecture(header)))
    forms = LAYOUTS.get(model.config.model_type, (Layout(**BASE),))
    return open_checkpoint(model, checkpoint, forms, header.path, dtype, shardings)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a GGUF file by name, as they are stored; opening one dequantizes it.

    Raises:
        ValueError: see `open_params`.
    """
    header = read_header(path)
    found = _checkpoint(header, np.dtype(np.float32), {})
    refuse(found.problems)
    return found.tensors


# --- Names and axes ------------------------------------------------------------------------------


def _weight(name: str, param: str, pattern: str) -> Rule:
    return Rule(name, (param,), pattern)


MLP_PARTS = ("gate", "up", "down")
OUT = (
    _weight("attn_output.weight", "attn/o", "nhd->d(nh)"),
    _weight("attn_output.bias", "attn/o_bias", "d->d"),
)
ROUTER = _weight("ffn_gate_inp.weight", "mlp/router", "de->ed")
BASE: dict[str, Any] = {
    "prefix": "blk.{i}.",
    "top": (
        _weight("token_embd.weight", "embedding", "vd->vd"),
        _weight("output_norm.weight", "final_norm", "d->d"),
        _weight("output.weight", "lm_head", "dv->vd"),
    ),
    "norms": (
        _weight("attn_norm.weight", "attn_pre_norm", "d->d"),
        _weight("ffn_norm.weight", "mlp_pre_norm", "d->d"),
        _weight("post_attention_norm.weight", "attn_post_norm", "d->d"),
        _weight("post_ffw_norm.weight", "mlp_post_norm", "d->d"),
    ),
    "attention": (
        *(_weight(f"attn_{p}.weight", f"attn/{p}", "dnh->(nh)d") for p in "qkv"),
        *(_weight(f"attn_{p}.bias", f"attn/{p}_bias", "nh->(nh)") for p in "qkv"),
        *(_weight(f"attn_{p}_norm.weight", f"attn/{p}_norm", "h->h") for p in "qk"),
        *OUT,
    ),
    "mlp": (
        *(_weight(f"ffn_{p}.weight", f"mlp/{p}", "ab->ba") for p in MLP_PARTS),
        *(_weight(f"ffn_{p}.bias", f"mlp/{p}_bias", "f->f") for p in MLP_PARTS),
    ),
    "experts": (
        ROUTER,
        *(_weight(f"ffn_{p}_exps.weight", f"mlp/{p}", "eab->eba") for p in MLP_PARTS),
    ),
}
"""The fields of `Layout` for all architectures: the names of the parts that a model has."""
FUSED: dict[str, Any] = {
    "attention": (
        Rule("attn_qkv.weight", ("attn/q", "attn/k", "attn/v"), "dnh->(nh)d", join="n"),
        *OUT,
    ),
    "mlp": (
        Rule("ffn_up.weight", ("mlp/gate", "mlp/up"), "df->fd", join="f"),
        _weight("ffn_down.weight", "mlp/down", "fd->df"),
    ),
}
OLD_EXPERTS = (
    ROUTER,
    *(_weight(f"ffn_{p}.{{e}}.weight", f"mlp/{p}", "ab->ba") for p in MLP_PARTS),
)
"""Files of 2023 and early 2024 have a tensor for each expert."""
LAYOUTS = {
    "phi3": (Layout(**{**BASE, **FUSED}),),
    "mixtral": (Layout(**BASE), Layout(**{**BASE, "experts": OLD_EXPERTS})),
}
"""model_type → its layouts, where they differ from `BASE`."""


# --- Values --------------------------------------------------------------------------------------


def _changes(config: ModelConfig, rules: Architecture) -> dict[str, Change]:
    """What to undo in the tensors of a file, by name."""
    changes: dict[str, Change] = {}
    for i, layer in enumerate(config.layers):
        attention = layer.attention
        if rules.permuted and isinstance(attention, GQAConfig):
            for part, heads in (("q", attention.num_heads), ("k", attention.num_kv_heads)):
                for kind in ("weight", "bias"):
                    changes[f"blk.{i}.attn_{part}.{kind}"] = halves_apart(heads)
        if rules.norm_offset:
            norms = (*BASE["norms"], *BASE["attention"])
            names = [rule.name for rule in norms if rule.name.endswith("_norm.weight")]
            changes |= {f"blk.{i}.{name}": minus(rules.norm_offset) for name in names}
    if rules.norm_offset:
        changes["output_norm.weight"] = minus(rules.norm_offset)
    return changes


def halves_apart(heads: int) -> Change:
    """Puts the first half of each head before its second half, where their rows alternate."""

    def change(rows: np.ndarray) -> np.ndarray:
        pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
        return pairs.swapaxes(1, 2).reshape(rows.shape)

    return change


def minus(offset: float) -> Change:
    """Subtracts a number in float32: the difference has more digits than a half type holds."""
    return lambda weights: weights.astype(np.float32) - np.float32(offset)


@dataclass(frozen=True)
class GGUFTensor(StoredTensor):
    """A tensor of a GGUF file.

    Attributes:
        dtype: of its numbers once it is open; of a quantized tensor, whatever is asked for.
        kind: its quantization, such as "Q4_K", or the type of its plain numbers.
        block, size: numbers in a block and bytes of a block.
        change: is applied to the numbers.
    """

    kind: str
    block: int
    size: int
    change: Change | None = None

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) // self.block * self.size

    @property
    def stored_as(self) -> str:
        return self.kind

    def view(self, file: np.ndarray) -> np.ndarray:
        """The numbers: a view of the file for plain ones, an array for quantized ones."""
        stored = file[self.start : self.start + self.nbytes]
        if self.kind in PLAIN:
            values = stored.view(PLAIN[self.kind]).reshape(self.shape)
        else:
            values = dequantized(stored, self).reshape(self.shape)
        return self.change(values) if self.change else values


def dequantized(stored: np.ndarray, tensor: GGUFTensor) -> np.ndarray:
    """The numbers of blocks, in the tensor's dtype, as one row."""
    from gguf import GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType[tensor.kind]
    out = np.empty(len(stored) // tensor.size * tensor.block, tensor.dtype)
    step = max(1, PIECE_NUMBERS // tensor.block)  # blocks
    for start in range(0, len(stored) // tensor.size, step):
        piece = stored[start * tensor.size : (start + step) * tensor.size]
        with np.errstate(over="ignore", invalid="ignore"):  # infinite scales give infinite weights
            values = dequantize(piece.reshape(1, -1), kind).reshape(-1)
            out[start * tensor.block :][: len(values)] = values
    return out


def _checkpoint(header: Header, dtype: np.dtype, changes: dict[str, Change]) -> Checkpoint:
    """The tensors of a file, with a problem for each that cannot be read.

    Args:
        dtype: for the numbers of quantized tensors, where weights may have it.
    """
    target = dtype if dtype in WEIGHT_DTYPES else np.dtype(np.float32)
    tensors = {
        name: _tensor(place, target, changes.get(name))
        for name, place in header.tensors.items()
        if name not in (FACTORS, LONG, SHORT)  # `rope_entries` reads them into the configuration
    }
    readable = {kind: _readable(kind) for kind in {tensor.kind for tensor in tensors.values()}}
    bad = {name: tensor.kind for name, tensor in tensors.items() if not readable[tensor.kind]}
    lines = collapsed(
        (f"{header.path}: ", name, f" is quantized as {kind}, which the gguf package does not read")
        for name, kind in bad.items()
    )
    kept = {name: tensor for name, tensor in tensors.items() if name not in bad}
    return Checkpoint(dict(kept), tuple(lines), frozenset(bad))


def _tensor(place: Place, dtype: np.dtype, change: Change | None) -> GGUFTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType(place.kind)
    found = PLAIN.get(kind.name, dtype)
    block = GGML_QUANT_SIZES[kind]
    return GGUFTensor(place.path, found, place.shape, place.start, kind.name, *block, change)


def _readable(kind: str) -> bool:
    """Whether the gguf package turns blocks of this kind into numbers: it tries one of zeros."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    if kind in PLAIN:
        return True
    number = GGMLQuantizationType[kind]
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[number][1]), np.uint8), number)
    except NotImplementedError:
        return False
    return True
