"""Linen modules over free functions."""

from kvjax.nn.transformer import Transformer

__all__ = ["Transformer"]
