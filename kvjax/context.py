"""A context that is read and compressed once, kept in one file, and asked many questions."""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kvjax.cache import DenseCache, HeadBudgetCache, LatentCache, cache_bytes
from kvjax.config import ModelConfig
from kvjax.decoding import prefill
from kvjax.finite import check_finite, first_not_finite
from kvjax.headkv.policy import Policy, resolve
from kvjax.headkv.scores import default_scores
from kvjax.hf.tensor_file import NewTensor, read_header, read_metadata, write_file
from kvjax.identity import Identity, identity
from kvjax.mesh import automatic_axes, on_automatic_mesh
from kvjax.nn import Transformer
from kvjax.numerics import not_finite
from kvjax.paths import local_path
from kvjax.prompts import bucket_length, check_prompts, pad
from pallas_kernels import Quantized
from pallas_kernels.segments import StaticSegments, TracedSegments

PARTS = {
    part.__name__: part
    for part in (
        DenseCache,
        HeadBudgetCache,
        LatentCache,
        Quantized,
        StaticSegments,
        TracedSegments,
    )
}
FORMAT = "kvjax context 2"
"""Format 1 knew a model by its configuration and final norm only."""


@dataclass(frozen=True)
class Context:
    """The compressed cache of one text; `kvjax.generate(…, context=…)` goes on from it.

    Attributes:
        cache: one cache a layer, of one sequence, without room for more tokens.
        length: tokens that were read.
        policy: how it was compressed, in words.
        model: the model that read it.
    """

    cache: list[Any]
    length: int
    policy: str
    model: Identity

    @property
    def nbytes(self) -> int:
        """Bytes of the cache's arrays."""
        return cache_bytes(self.cache)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file.

        Raises:
            ValueError: the path is a URL.
        """
        path = local_path(path, "the context")
        tensors: dict[str, np.ndarray] = {}
        layers = [_describe(cache, f"{i}", tensors) for i, cache in enumerate(self.cache)]
        model = dataclasses.asdict(self.model)
        facts = {"length": self.length, "policy": self.policy, "model": model}
        content = json.dumps({"format": FORMAT, "layers": layers, **facts})
        new = [
            NewTensor(name, array.dtype, array.shape, lambda array=array: array)
            for name, array in tensors.items()
        ]
        write_file(path, new, {"kvjax": content})


@automatic_axes()
def compress(
    model: Transformer, params: Any, tokens: Sequence[int], policy: str | Policy
) -> Context:
    """Reads a text and keeps what the policy keeps of it.

    Args:
        tokens: ids; questions about them come later.
        policy: as in `kvjax.generate`. Without a question in sight, policies that go by the last
            queries lose their guide; see docs/headkv.md.

    Raises:
        ValueError: no tokens, more than the model's context holds, a policy that cannot be
            resolved, one that bounds the growth (ring, every), or logits that are not finite.
    """
    check_prompts(model.config, [tokens], 1, 0)
    params = on_automatic_mesh(params)
    resolved = resolve(policy, model.config, default_scores(model.config))
    if getattr(resolved, "ring", 0) or getattr(resolved, "every", 0):
        raise ValueError("a context has no growth to bound: policies with ring or every don't fit")
    bucket = bucket_length(len(tokens))
    ids, lengths = pad([tokens], bucket)
    plan = resolved.plan(model.config, bucket, params["embedding"].dtype)
    logits, cache = prefill(model, params, ids, lengths, plan, max_new_tokens=0)
    if first_not_finite(logits) is not None:
        raise not_finite("the logits after the text", model, params, tokens)
    name = policy if isinstance(policy, str) else type(policy).__name__
    return Context(cache, len(tokens), name, reader_identity(model.config, params))


def load_context(path: str | Path, model: Transformer, params: Any) -> Context:
    """Reads a context that `Context.save` wrote, for the model that it was made with.

    Raises:
        ValueError: no such file, another file, a damaged one, a context of another model, or one
            that holds NaN.
    """
    path = local_path(path, "the context")
    if not path.is_file():
        raise ValueError(f"no context at {path}")
    context = _read(path)
    check_model(context, model, params, str(path))
    if len(context.cache) != model.config.num_layers or context.length < 1:
        raise ValueError(
            f"{path} is a damaged context: got {len(context.cache)} layers of {context.length} "
            f"tokens, expected {model.config.num_layers} of at least 1"
        )
    check_finite(context.cache, f"{path}: layer ")
    return context


def _read(path: Path) -> Context:
    stored, metadata = read_header(path), read_metadata(path)
    try:
        content = json.loads(metadata.get("kvjax", "{}"))
        if (found := content.get("format")) == FORMAT:
            cache = [_rebuild(layer, stored) for layer in content["layers"]]
            made_with = content["model"] | {"weights": dict(content["model"]["weights"])}
            length = operator.index(content["length"])
            return Context(cache, length, str(content["policy"]), Identity(**made_with))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        kind = type(error).__name__
        raise ValueError(
            f"{path} is no context: its description is damaged ({kind}: {error})"
        ) from None
    raise ValueError(f"{path} is no context: got {found}, expected {FORMAT}")


def check_model(
    context: Context, model: Transformer, params: Any, name: str = "the context"
) -> None:
    """Raises ValueError, which says what differs, unless this very model read the context.

    All weights are read once, which takes about as long as one step of decoding.
    """
    found = reader_identity(model.config, params).differences(context.model)
    if found:
        raise ValueError(f"{name} is of another model: {found}")


def reader_identity(config: ModelConfig, params: Any) -> Identity:
    """What decides how a model reads; the ids that begin and end its texts do not."""
    return identity(dataclasses.replace(config, bos_id=None, eos_ids=()), params)


def on_devices_of(params: Any, cache: list[Any]) -> list[Any]:
    """The cache where the parameters lie: whole on each of their devices, if it lies elsewhere."""
    wanted = getattr(params["embedding"], "sharding", None)
    devices = jax.tree.leaves(cache)[0].sharding.device_set
    if wanted is None or devices == wanted.device_set:
        return cache
    if isinstance(wanted, NamedSharding):
        wanted = NamedSharding(wanted.mesh, PartitionSpec())
    return jax.device_put(cache, wanted)


def _describe(value: Any, name: str, tensors: dict[str, np.ndarray]) -> Any:
    """A part of a cache as JSON; arrays go to `tensors`, and their names stay."""
    if isinstance(value, jax.Array):
        tensors[name] = np.asarray(value)
        return {"tensor": name}
    if dataclasses.is_dataclass(value):
        fields = {
            field.name: _describe(getattr(value, field.name), f"{name}.{field.name}", tensors)
            for field in dataclasses.fields(value)
        }
        return {"part": type(value).__name__, "fields": fields}
    return value


def _rebuild(value: Any, stored: Any) -> Any:
    """The inverse of `_describe`."""
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return jnp.asarray(stored[value["tensor"]].open())
    fields = {name: _rebuild(item, stored) for name, item in value["fields"].items()}
    return PARTS[value["part"]](**fields)
