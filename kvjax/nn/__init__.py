"""The transformer: Linen modules that call pure functions."""

from kvjax.nn.params import param_shapes
from kvjax.nn.transformer import Transformer

__all__ = ["Transformer", "param_shapes"]
