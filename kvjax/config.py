"""Model configuration as frozen, hashable dataclasses: a model can be a static argument of jit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, TypeVar

from kvjax.checks import COUNT, Range
from kvjax.fields import Count, Number, OneOf, Positive, Size

Token = Annotated[int, Range(least=-1, most=COUNT.most, whole=True)]
"""A token id. Files on the hub say −1 for "none"."""
Activation = Annotated[str, OneOf(("silu", "gelu_tanh"))]
Normed = Annotated[str, OneOf(("head", "all"))]
Site = Annotated[str, OneOf(("after_up", "before_up"))]


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (arXiv 2306.15595): divides every frequency by `factor`."""

    factor: Positive


@dataclass(frozen=True)
class DynamicScaling:
    """NTK-aware scaling: beyond `original_length` tokens the base grows with the length."""

    factor: Positive
    original_length: Count


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: divides low frequencies by `factor` and keeps high ones; a linear ramp between."""

    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_length: Count


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071); `attention_factor` multiplies cos and sin."""

    factor: Positive
    original_length: Count
    attention_factor: Positive
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (arXiv 2402.13753): a divisor per frequency; short ones up to `original_length`."""

    short_factor: tuple[Positive, ...]
    long_factor: tuple[Positive, ...]
    original_length: Count
    attention_factor: Positive


@dataclass(frozen=True)
class SelectedPairs:
    """A selection of another rotary embedding's frequencies, one for each pair of components.

    A frequency may occur more than once. The selection does not change rules that depend on the
    length, nor attention factors.

    In a program that layers share, the selection is an argument: see `kvjax.nn.layers.Turn`.
    """

    of: RopeConfig
    pairs: tuple[Size, ...]


RopeScaling = (
    LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling | SelectedPairs
)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the first `dim` components of a head.

    Attributes:
        dim: rotary width R; smaller than the head dim for partial rotary embeddings.
        theta: base of the frequencies theta^(-2i/R).
        scaling: how frequencies change for long contexts; None for no change.
        interleaved: pairs are (2i, 2i+1) as in DeepSeek, otherwise (i, i + R/2).
    """

    dim: Size
    theta: Positive = 10_000.0
    scaling: RopeScaling | None = None
    interleaved: bool = False

    @property
    def rule(self) -> RopeScaling | None:
        """The scaling rule, also when frequencies are selected from it."""
        return self.scaling.of.rule if isinstance(self.scaling, SelectedPairs) else self.scaling


@dataclass(frozen=True)
class NormConfig:
    """RMS norm x / rms(x) · (offset + weight); Gemma stores weight − 1, so its offset is 1."""

    eps: Annotated[float, Range(least=0, most=1)] = 1e-6
    offset: Number = 0.0


@dataclass(frozen=True)
class AttentionSpec:
    """How attention treats its logits: scale, sliding window, soft-cap (see `GQAConfig`)."""

    scale: Positive
    window: Count | None = None
    softcap: Positive | None = None


@dataclass(frozen=True)
class GQAConfig:
    """Grouped-query attention.

    Attributes:
        num_heads, num_kv_heads, head_dim: N, K and H.
        scale: multiplies the logits q·k.
        rope: None for layers without positions (NoPE).
        window: a query sees itself and the `window` − 1 tokens before it; None for all.
        softcap: logits become softcap · tanh(logits / softcap).
        qkv_bias, out_bias: which projections carry a bias.
        qk_norm: RMS norm of queries and keys; None for none. Its weight covers one head ("head":
            Qwen3, Gemma 3) or all heads ("all": OLMo 2).
        norm: the norm that qk_norm uses.
    """

    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    scale: Positive
    rope: RopeConfig | None
    window: Count | None = None
    softcap: Positive | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Normed | None = None
    norm: NormConfig = NormConfig()

    # Facts that the other attentions override. Caches, policies and plans ask for these facts
    # instead of testing for a class.
    no_head_budget = None
    """Why the heads cannot keep different tokens; None if they can."""
    rebuilds_keys = False
    """Whether every step rebuilds the keys from cached latents."""
    shared_latent = False
    """Whether all heads share one cached latent and one rotary key."""

    @property
    def spec(self) -> AttentionSpec:
        """Scale, window and soft-cap of the logits."""
        return AttentionSpec(self.scale, self.window, self.softcap)

    @property
    def unconverted(self) -> GQAConfig:
        """The attention before a conversion; without a conversion the attention itself."""
        return self

    @property
    def query_heads(self) -> int:
        """N."""
        return self.num_heads

    @property
    def cached_heads(self) -> int:
        """Number of heads, or of latent streams, in the cache."""
        return self.num_kv_heads

    @property
    def cached_widths(self) -> tuple[int, int]:
        """Numbers of a key and of a value in one cached head."""
        return self.head_dim, self.head_dim

    @property
    def budget_heads(self) -> int:
        """Number of heads that get budgets: K, or the K before conversion."""
        return self.num_kv_heads


class Converted:
    """Facts that a converted attention takes from the original attention."""

    base: GQAConfig

    @property
    def spec(self) -> AttentionSpec:
        """See `GQAConfig.spec`."""
        return self.base.spec

    @property
    def unconverted(self) -> GQAConfig:
        """See `GQAConfig.unconverted`."""
        return self.base

    @property
    def query_heads(self) -> int:
        """N."""
        return self.base.num_heads

    @property
    def budget_heads(self) -> int:
        """See `GQAConfig.budget_heads`."""
        return self.base.num_kv_heads


@dataclass(frozen=True)
class EqualCacheConfig(Converted):
    """GQA whose K and V projections are factored, W = down · up (TransMLA v1, arXiv 2502.07864v2).

    The cache holds the latents x · down: `latent_heads` streams of `key_rank` and `value_rank`
    numbers. The up-projections give every query head separate keys and values.

    Attributes:
        base: the attention that was converted, whose heads, scale, window, norms and RoPE apply.
        latent_heads: 1, or K if each KV head has a separate latent.
        key_rank, value_rank: width of one stream.
        rope_site: where RoPE applies: "after_up" (to the up-projected keys) or "before_up" (to the
            latent).
    """

    base: GQAConfig
    latent_heads: Count
    key_rank: Count
    value_rank: Count
    rope_site: Site = "after_up"

    shared_latent = False

    @property
    def rope(self) -> RopeConfig | None:
        """RoPE of the converted attention."""
        return self.base.rope

    @property
    def cached_heads(self) -> int:
        """See `GQAConfig.cached_heads`."""
        return self.latent_heads

    @property
    def cached_widths(self) -> tuple[int, int]:
        """See `GQAConfig.cached_widths`."""
        return self.key_rank, self.value_rank

    @property
    def no_head_budget(self) -> str | None:
        """See `GQAConfig.no_head_budget`."""
        # Heads with different tokens would need positions for each head to rotate the rebuilt keys.
        if self.rebuilds_keys:
            return "its keys are rotated after the up-projection, from latents without positions"
        if self.latent_heads != self.base.num_kv_heads:
            return f"its {self.base.num_kv_heads} KV heads share one latent"
        return None

    @property
    def rebuilds_keys(self) -> bool:
        """See `GQAConfig.rebuilds_keys`."""
        return self.rope_site == "after_up"


ONE_LATENT = "multi-head latent attention caches one latent for all heads"


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention with a decoupled RoPE key (DeepSeek-V2, arXiv 2405.04434).

    Attributes:
        num_heads: N.
        qk_nope_head_dim, qk_rope_head_dim, v_head_dim: widths of the parts of one head.
        kv_lora_rank: latent width L; a rotary key of width R is cached too.
        q_lora_rank: rank of the query projection; None for full rank.
        rope: None if nothing rotates (qk_rope_head_dim 0).
        latent_norm: RMS norm of the latent (and of the query latent); None for none.
        query_bias, latent_bias, out_bias: bias on the query heads, on the down-projections (for
            keys and values, and for queries if these have one), and on the output.
        window, softcap: as in `GQAConfig`.
    """

    num_heads: Count
    qk_nope_head_dim: Size
    qk_rope_head_dim: Size
    v_head_dim: Count
    kv_lora_rank: Count
    q_lora_rank: Count | None
    scale: Positive
    rope: RopeConfig | None
    latent_norm: NormConfig | None = NormConfig()
    query_bias: bool = False
    latent_bias: bool = False
    out_bias: bool = False
    window: Count | None = None
    softcap: Positive | None = None

    cached_heads = 1
    budget_heads = 1
    no_head_budget = ONE_LATENT
    rebuilds_keys = False
    shared_latent = True

    @property
    def spec(self) -> AttentionSpec:
        """See `GQAConfig.spec`."""
        return AttentionSpec(self.scale, self.window, self.softcap)

    @property
    def unconverted(self) -> MLAConfig:
        """See `GQAConfig.unconverted`."""
        return self

    @property
    def query_heads(self) -> int:
        """N."""
        return self.num_heads

    @property
    def cached_widths(self) -> tuple[int, int]:
        """Numbers of the latent and of the rotary key."""
        return self.kv_lora_rank, self.qk_rope_head_dim


@dataclass(frozen=True)
class DecoupledConfig(Converted):
    """GQA that caches one latent and one rotary key for all heads, computed from keys and values.

    This is the counterpart of `MLAConfig` for attention that norms its keys. The projections and
    norms of `base` stay, and the latent is a linear map of the keys and values that GQA would cache
    (TransMLA, arXiv 2502.07864v5).

    Attributes:
        base: the attention that was converted.
        rank: latent width L.
        rope: RoPE of the rotary key, whose width is rope.dim; None if nothing rotates.
        v_head_dim: width of a head's output before the output projection.
        out_bias: bias on the output, also if `base` has none.
    """

    base: GQAConfig
    rank: Count
    rope: RopeConfig | None
    v_head_dim: Count
    out_bias: bool = False

    cached_heads = 1
    no_head_budget = ONE_LATENT
    rebuilds_keys = False
    shared_latent = True

    @property
    def rope_dim(self) -> int:
        """Width R of the rotary key."""
        return 0 if self.rope is None else self.rope.dim

    @property
    def cached_widths(self) -> tuple[int, int]:
        """Numbers of the latent and of the rotary key."""
        return self.rank, self.rope_dim


AttentionConfig = GQAConfig | EqualCacheConfig | MLAConfig | DecoupledConfig
"""Each class has the facts that caches, policies and plans need: the properties of GQAConfig."""


@dataclass(frozen=True)
class MLPConfig:
    """Gated MLP: down(act(gate(x)) · up(x)); activation is "silu" or "gelu_tanh"."""

    width: Count
    activation: Activation = "silu"
    bias: bool = False


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of gated MLPs; each token passes through `top_k` experts.

    `normalize` divides the softmax weights of the chosen experts by their sum.
    """

    num_experts: Count
    top_k: Count
    width: Count
    activation: Activation = "silu"
    normalize: bool = True


@dataclass(frozen=True)
class LayerConfig:
    """One transformer block: attention and MLP."""

    attention: AttentionConfig
    mlp: MLPConfig | MoEConfig


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer.

    Attributes:
        model_type: Hugging Face's name of the model family.
        layers: one entry per layer; layers may differ.
        pre_norm, post_norm: norms before a sub-layer and on its output (Gemma has both).
        embedding_scale: multiplies the input embeddings (Gemma: √D).
        final_softcap: soft-cap on the output logits.
        max_position_embeddings: length of the context that the model was trained for.
        eos_ids: token ids that end a generation.
        hf_json: the original Hugging Face config.json, verbatim, which saving writes again.
        source: directory that the model was loaded from, with companion files such as
            head_scores.json, or its GGUF file; not part of the model's identity.
    """

    model_type: str
    vocab_size: Count
    hidden_size: Count
    layers: tuple[LayerConfig, ...]
    norm: NormConfig = NormConfig()
    pre_norm: bool = True
    post_norm: bool = False
    tie_embeddings: bool = False
    embedding_scale: Number = 1.0
    final_softcap: Positive | None = None
    max_position_embeddings: Count = 2048
    bos_id: Token | None = None
    eos_ids: tuple[Token, ...] = ()
    hf_json: str = dataclasses.field(default="{}", repr=False)
    source: str = dataclasses.field(default="", repr=False, compare=False)

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def context_length(self) -> int:
        """Maximum length of prompt and answer together, after RoPE scaling."""
        # With these two rules max_position_embeddings may be the length before stretching.
        stretched = [
            int(rule.factor * rule.original_length)
            for layer in self.layers
            if (rope := layer.attention.rope) is not None
            and isinstance(rule := rope.rule, DynamicScaling | YarnScaling)
        ]
        return max([self.max_position_embeddings, *stretched])

    @property
    def sliding_windows(self) -> tuple[int | None, ...]:
        """[L] the sliding window of each layer, None for none."""
        return tuple(layer.attention.spec.window for layer in self.layers)

    @property
    def query_heads(self) -> int:
        """N; raises ValueError if layers have different numbers of query heads."""
        return _the_same({layer.attention.query_heads for layer in self.layers}, "query heads")

    @property
    def budget_heads(self) -> int:
        """K, the heads that get budgets; raises ValueError if layers have different numbers."""
        return _the_same({layer.attention.budget_heads for layer in self.layers}, "KV heads")

    def with_attention(self, attention: tuple[AttentionConfig, ...]) -> ModelConfig:
        """The same model with the given attention in each layer."""
        if len(attention) != len(self.layers):
            raise ValueError(
                f"got {len(attention)} attention configs for {len(self.layers)} layers"
            )
        layers = tuple(
            dataclasses.replace(layer, attention=a)
            for layer, a in zip(self.layers, attention, strict=True)
        )
        return dataclasses.replace(self, layers=layers)


def _the_same(heads: set[int], name: str) -> int:
    """The number of heads, which must be equal in all layers."""
    if len(heads) != 1:
        raise ValueError(f"layers have {sorted(heads)} {name}, expected the same in all")
    return heads.pop()


Kind = TypeVar("Kind", bound=AttentionConfig)


def of_kind(attention: AttentionConfig, kind: type[Kind]) -> Kind:
    """Returns the attention; raises TypeError unless its class is `kind`."""
    if not isinstance(attention, kind):
        raise TypeError(f"got {type(attention).__name__}, expected {kind.__name__}")
    return attention
