"""The transformer: Linen modules that call pure functions."""

from kvjax.nn.transformer import Transformer

__all__ = ["Transformer"]
