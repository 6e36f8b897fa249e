"""A grouped-query transformer in plain NumPy, float64: an oracle that shows its attention."""

from typing import Any, NamedTuple

import numpy as np


class Forward(NamedTuple):
    """attention [L, N, T, T] and logits [T, V] of one sequence."""

    attention: np.ndarray
    logits: np.ndarray


def forward(config, params: Any, ids, gates=None) -> Forward:
    """The full causal forward; `gates` [L, N] scale the heads' outputs."""
    ids = np.asarray(ids)
    gates = np.ones((config.num_layers, 1)) if gates is None else gates
    embedding = array(params["embedding"])
    x, rows = embedding[ids], []
    for index, layer in enumerate(config.layers):
        p = params[f"layers_{index}"]
        normed = rms_norm(x, p["attn_pre_norm"], config.norm)
        out, attention = attend(normed, p["attn"], layer.attention, gates[index])
        rows.append(attention)
        x = x + out
        normed = rms_norm(x, p["mlp_pre_norm"], config.norm)
        gate, up = normed @ array(p["mlp"]["gate"]), normed @ array(p["mlp"]["up"])
        x = x + (gate / (1 + np.exp(-gate)) * up) @ array(p["mlp"]["down"])
    x = rms_norm(x, params["final_norm"], config.norm)
    head = embedding.T if config.tie_embeddings else array(params["lm_head"])
    return Forward(np.stack(rows), x @ head)


def attend(x, params, config, gates):
    """Output [T, D] and weights [N, T, T]; no biases, windows, soft-caps or norms."""
    q, k, v = (np.einsum("td,dnh->nth", x, array(params[name])) for name in "qkv")
    q, k = rotate(q, config.rope.theta), rotate(k, config.rope.theta)
    groups = config.num_heads // config.num_kv_heads
    k, v = np.repeat(k, groups, axis=0), np.repeat(v, groups, axis=0)
    logits = np.einsum("nth,nsh->nts", q, k) * config.scale
    logits = np.where(np.tri(len(x), dtype=bool)[None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    heads = np.einsum("nts,nsh->nth", weights, v) * gates.reshape(-1, 1, 1)
    return np.einsum("nth,nhd->td", heads, array(params["o"])), weights


def rotate(x, theta):
    """RoPE of [N, T, H]: component i turns with component i + H/2."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def rms_norm(x, weight, config):
    """x / rms(x) · (offset + weight)."""
    scale = array(weight) + config.offset
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.eps) * scale


def array(x) -> np.ndarray:
    """float64."""
    return np.asarray(x, np.float64)
