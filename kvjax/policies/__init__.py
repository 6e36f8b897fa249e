"""Cache policies: which tokens of a prompt the cache keeps.

A policy is an allocator, which divides a size among the heads, and a scorer, which rates the tokens
of each head. Each published method has a maker here; a string names the same thing:

Examples:
    >>> kvjax.policies.snapkv(kv_size=128) == kvjax.policies.parse_policy("snapkv:kv_size=128")
    True
"""

from kvjax.policies.budgets import Request, Uniform
from kvjax.policies.compression import Budgets
from kvjax.policies.named import (
    adasnapkv,
    expected,
    full,
    h2o,
    headkv,
    headkv_adaptive,
    headkv_paper,
    keydiff,
    knorm,
    parse_policy,
    pyramidkv,
    snapkv,
    spankv,
    streaming,
    tova,
)
from kvjax.policies.policy import Compress, Full, Policy
from kvjax.policies.scorers import LayerView

__all__ = [
    "Budgets",
    "Compress",
    "Full",
    "LayerView",
    "Policy",
    "Request",
    "Uniform",
    "adasnapkv",
    "expected",
    "full",
    "h2o",
    "headkv",
    "headkv_adaptive",
    "headkv_paper",
    "keydiff",
    "knorm",
    "parse_policy",
    "pyramidkv",
    "snapkv",
    "spankv",
    "streaming",
    "tova",
]
