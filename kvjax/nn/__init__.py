"""The transformer: tables of parameters, pure functions, and a Linen module that joins the two."""

from kvjax.nn.params import param_shapes
from kvjax.nn.transformer import Transformer

__all__ = ["Transformer", "param_shapes"]
