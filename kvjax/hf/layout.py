"""Which tensor of a checkpoint holds which parameters, with which axes, under which name."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np

from kvjax.config import GQAConfig, LayerConfig, MLAConfig, MLPConfig, ModelConfig, MoEConfig

ParamPath = tuple[str, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One tensor of the checkpoint.

    Attributes:
        name: in the checkpoint, below the layer's prefix; "{e}" stands for the expert's number.
        params: the parameters that the tensor holds, such as "attn/q".
        pattern: our axes → the tensor's axes. "dnh->(nh)d" transposes to [N, H, D] and merges the
            first two axes.
        join: the axis along which several parameters are concatenated.
    """

    name: str
    params: tuple[str, ...]
    pattern: str
    join: str | None = None

    @functools.cached_property
    def permutation(self) -> tuple[int, ...]:
        """For each axis of the unmerged tensor, which of our axes it is."""
        ours, theirs = self.pattern.split("->")
        return tuple(ours.index(axis) for axis in theirs if axis not in "()")

    def merged(self, shape: Shape) -> Shape:
        """The unmerged shape with the axes in parentheses multiplied."""
        sizes, out, inside = iter(shape), [], False  # inside: within parentheses
        for symbol in self.pattern.split("->")[1]:
            if symbol in "()":
                inside = symbol == "("
                out += [1] if inside else []
            elif inside:
                out[-1] *= next(sizes)
            else:
                out.append(next(sizes))
        return tuple(out)

    @property
    def join_axis(self) -> int:
        """Position of `join` in the unmerged tensor."""
        theirs = self.pattern.split("->")[1].replace("(", "").replace(")", "")
        return theirs.index(self.join) if self.join else 0


@dataclass(frozen=True)
class Tensor:
    """A rule for one layer (and expert) of a given model.

    Attributes:
        name: its full name in the checkpoint.
        rule: the axes of the tensor.
        params: paths of the parameters that the tensor holds.
        param_shapes: their shapes, without the expert axis if `expert` is given.
        expert: the index along the parameters' first axis.
    """

    name: str
    rule: Rule
    params: tuple[ParamPath, ...]
    param_shapes: tuple[Shape, ...]
    expert: int | None = None

    @property
    def _unmerged_shape(self) -> Shape:
        shapes = [[s[axis] for axis in self.rule.permutation] for s in self.param_shapes]
        shape, axis = list(shapes[0]), self.rule.join_axis
        shape[axis] = sum(s[axis] for s in shapes)
        return tuple(shape)

    @property
    def shape(self) -> Shape:
        """Its shape in the checkpoint."""
        return self.rule.merged(self._unmerged_shape)

    def split(self, stored: np.ndarray) -> list[np.ndarray]:
        """The stored tensor as views of its parameters, in our layout."""
        axis = self.rule.join_axis
        sizes = [shape[self.rule.permutation[axis]] for shape in self.param_shapes]
        # All views: nothing is read from the mapped file until a part is copied.
        parts = np.split(stored.reshape(self._unmerged_shape), np.cumsum(sizes)[:-1], axis)
        return [part.transpose(tuple(np.argsort(self.rule.permutation))) for part in parts]

    def merge(self, params: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor as it is stored: the inverse of `split`."""
        parts = [p.transpose(self.rule.permutation) for p in params]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts, self.rule.join_axis)
        return joined.reshape(self.shape)


# --- The table -----------------------------------------------------------------------------------


def _weight(name: str, param: str, pattern: str) -> Rule:
    return Rule(name, (param,), pattern)


EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
TOP = (
    _weight(EMBEDDING, "embedding", "vd->vd"),
    _weight("model.norm.weight", "final_norm", "d->d"),
    _weight(HEAD, "lm_head", "dv->vd"),
)
PRE_NORMS = (
    _weight("input_layernorm.weight", "attn_pre_norm", "d->d"),
    _weight("post_attention_layernorm.weight", "mlp_pre_norm", "d->d"),
)
POST_NORMS = (
    _weight("post_attention_layernorm.weight", "attn_post_norm", "d->d"),
    _weight("post_feedforward_layernorm.weight", "mlp_post_norm", "d->d"),
)
SANDWICH_NORMS = (
    _weight("input_layernorm.weight", "attn_pre_norm", "d->d"),
    _weight("pre_feedforward_layernorm.weight", "mlp_pre_norm", "d->d"),
    *POST_NORMS,
)
OUT = (
    _weight("self_attn.o_proj.weight", "attn/o", "nhd->d(nh)"),
    _weight("self_attn.o_proj.bias", "attn/o_bias", "d->d"),
)
SEPARATE_QKV = (
    *(_weight(f"self_attn.{p}_proj.weight", f"attn/{p}", "dnh->(nh)d") for p in "qkv"),
    *(_weight(f"self_attn.{p}_proj.bias", f"attn/{p}_bias", "nh->(nh)") for p in "qkv"),
    *(_weight(f"self_attn.{p}_norm.weight", f"attn/{p}_norm", "h->h") for p in "qk"),
    *OUT,
)
FUSED_QKV = (
    Rule("self_attn.qkv_proj.weight", ("attn/q", "attn/k", "attn/v"), "dnh->(nh)d", join="n"),
    *OUT,
)
LATENT = (
    _weight("self_attn.q_a_proj.weight", "attn/q_a", "dl->ld"),
    _weight("self_attn.q_a_proj.bias", "attn/q_a_bias", "l->l"),
    _weight("self_attn.q_a_layernorm.weight", "attn/q_norm", "l->l"),
    _weight("self_attn.kv_a_proj_with_mqa.weight", "attn/kv_a", "dl->ld"),
    _weight("self_attn.kv_a_proj_with_mqa.bias", "attn/kv_a_bias", "l->l"),
    _weight("self_attn.kv_a_layernorm.weight", "attn/kv_norm", "l->l"),
    Rule("self_attn.kv_b_proj.weight", ("attn/k_up", "attn/v_up"), "lnh->(nh)l", join="h"),
    *OUT,
)
MLP_PARTS = ("gate", "up", "down")
SEPARATE_MLP = (
    *(_weight(f"mlp.{p}_proj.weight", f"mlp/{p}", "ab->ba") for p in MLP_PARTS),
    *(_weight(f"mlp.{p}_proj.bias", f"mlp/{p}_bias", "f->f") for p in MLP_PARTS),
)
FUSED_MLP = (
    Rule("mlp.gate_up_proj.weight", ("mlp/gate", "mlp/up"), "df->fd", join="f"),
    _weight("mlp.down_proj.weight", "mlp/down", "fd->df"),
)
ROUTER = _weight("mlp.gate.weight", "mlp/router", "de->ed")
SEPARATE_EXPERTS = (
    ROUTER,
    *(_weight(f"mlp.experts.{{e}}.{p}_proj.weight", f"mlp/{p}", "ab->ba") for p in MLP_PARTS),
)
MIXTRAL_EXPERTS = (
    _weight("block_sparse_moe.gate.weight", "mlp/router", "de->ed"),
    *(
        _weight(f"block_sparse_moe.experts.{{e}}.{w}.weight", f"mlp/{p}", "ab->ba")
        for w, p in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
    ),
)
FUSED_EXPERTS = (
    ROUTER,
    Rule("mlp.experts.gate_up_proj", ("mlp/gate", "mlp/up"), "edf->efd", join="f"),
    _weight("mlp.experts.down_proj", "mlp/down", "efd->edf"),
)


@dataclass(frozen=True)
class Layout:
    """The rules of a family's parts. A rule applies if the model has the parameters of the rule.

    Attributes:
        prefix: of the names in a layer; "{i}" stands for the layer's number.
        top: the rules outside of the layers.
    """

    prefix: str = "model.layers.{i}."
    top: tuple[Rule, ...] = TOP
    norms: tuple[Rule, ...] = PRE_NORMS
    attention: tuple[Rule, ...] = SEPARATE_QKV
    mlp: tuple[Rule, ...] = SEPARATE_MLP
    experts: tuple[Rule, ...] = SEPARATE_EXPERTS


LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "mixtral": (Layout(experts=MIXTRAL_EXPERTS), Layout(experts=FUSED_EXPERTS)),
    "qwen3_moe": (Layout(), Layout(experts=FUSED_EXPERTS)),
    "gemma2": (Layout(norms=SANDWICH_NORMS),),
    "gemma3_text": (Layout(norms=SANDWICH_NORMS),),
    "olmo2": (Layout(norms=POST_NORMS),),
    "phi3": (Layout(attention=FUSED_QKV, mlp=FUSED_MLP),),
}
"""model_type → the layouts of its files; `save` writes the first. Other types are as llama."""


def layouts(config: ModelConfig) -> tuple[Layout, ...]:
    """The ways in which this family's checkpoints are written."""
    return LAYOUTS.get(config.model_type, (Layout(),))


@functools.singledispatch
def attention_rules(config, layout: Layout) -> tuple[Rule, ...]:
    """The rules of one layer's attention."""
    raise ValueError(f"the hf layout cannot express {type(config).__name__}; use layout='native'")


@attention_rules.register
def _(config: GQAConfig, layout: Layout) -> tuple[Rule, ...]:
    return layout.attention


@attention_rules.register
def _(config: MLAConfig, layout: Layout) -> tuple[Rule, ...]:
    name = "q_proj" if config.q_lora_rank is None else "q_b_proj"
    return (_weight(f"self_attn.{name}.weight", "attn/q", "dnh->(nh)d"), *LATENT)


@functools.singledispatch
def mlp_rules(config, layout: Layout) -> tuple[Rule, ...]:
    """The rules of one layer's MLP."""
    raise ValueError(f"the hf layout cannot express {type(config).__name__}; use layout='native'")


@mlp_rules.register
def _(config: MLPConfig, layout: Layout) -> tuple[Rule, ...]:
    return layout.mlp


@mlp_rules.register
def _(config: MoEConfig, layout: Layout) -> tuple[Rule, ...]:
    return layout.experts


def tensors(config: ModelConfig, shapes: Mapping[ParamPath, Shape], layout: Layout) -> list[Tensor]:
    """Every tensor of a checkpoint of this model.

    Args:
        shapes: of all parameters, by path.

    Raises:
        ValueError: the layout has no tensor for some parameters.
    """
    found = list(_bind(layout.top, shapes, "", ()))
    for i, layer in enumerate(config.layers):
        rules = _layer_rules(layer, layout)
        found += _bind(rules, shapes, layout.prefix.format(i=i), (f"layers_{i}",))
    homeless = set(shapes) - {path for tensor in found for path in tensor.params}
    if homeless:
        names = ", ".join(sorted("/".join(path) for path in homeless))
        raise ValueError(f"the hf layout has no place for {names}; use layout='native'")
    return found


def _layer_rules(layer: LayerConfig, layout: Layout) -> tuple[Rule, ...]:
    attention = attention_rules(layer.attention, layout)
    return (*layout.norms, *attention, *mlp_rules(layer.mlp, layout))


def _bind(
    rules: Sequence[Rule], shapes: Mapping[ParamPath, Shape], prefix: str, scope: ParamPath
) -> Iterator[Tensor]:
    for rule in rules:
        paths = tuple(scope + tuple(param.split("/")) for param in rule.params)
        if any(path not in shapes for path in paths):
            continue
        full = tuple(shapes[path] for path in paths)
        if "{e}" not in rule.name:
            yield Tensor(prefix + rule.name, rule, paths, full)
            continue
        # Our experts are stacked along the first axis; the checkpoint has one tensor for each.
        one = tuple(shape[1:] for shape in full)
        for e in range(full[0][0]):
            yield Tensor(prefix + rule.name.format(e=e), rule, paths, one, expert=e)


BASE = "model."
"""Prefix that checkpoints of the bare model, without an output matrix, leave out."""


def canonical(name: str, expected: Set[str]) -> str:
    """The expected name for a stored name, by transformers' rule; other names are unchanged.

    A checkpoint of the bare model has "norm.weight" for "model.norm.weight", and one of a model
    that contains the language model has "model.model.norm.weight".
    """
    without = name.removeprefix(BASE)
    if without != name and without in expected:
        return without
    return BASE + name if BASE + name in expected and name not in expected else name


def other_names(missing: Iterable[str], unexpected: Iterable[str]) -> tuple[set[str], list[str]]:
    """Missing tensors that the checkpoint has under another prefix.

    Returns:
        The missing and the unexpected names, where at least two tensors differ in the same prefix;
        and a line for each such prefix.
    """
    # Pair missing and unexpected names by the part that no wrapper changes.
    by_tail: dict[str, list[str]] = {}
    for name in unexpected:
        by_tail.setdefault(_tail(name), []).append(name)
    groups: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for expected in missing:
        stored = by_tail.get(_tail(expected), [])
        if len(stored) == 1:
            pair = (stored[0], expected)
            groups.setdefault(_difference(*pair), []).append(pair)
    # A difference that only one tensor has is a coincidence, not a prefix.
    names, lines = set(), []
    for (theirs, ours), pairs in groups.items():
        if len(pairs) > 1:
            names.update(name for pair in pairs for name in pair)
            lines.append(
                f"{len(pairs)} tensor names begin with {theirs!r}, expected "
                f"{repr(ours) if ours else 'none of that'} (got {pairs[0][0]}, expected "
                f"{pairs[0][1]})"
            )
    return names, lines


def _tail(name: str) -> str:
    """The part of a name that wrapper models leave unchanged: from "layers" on, or two words."""
    words = name.split(".")
    if "layers" in words:
        return ".".join(words[words.index("layers") :])
    return ".".join(words[-2:])


def _difference(stored: str, expected: str) -> tuple[str, ...]:
    """The prefixes in which two names differ, before their common last words."""
    ours, theirs = expected.split("."), stored.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    return tuple("".join(f"{word}." for word in words) for words in (theirs, ours))
