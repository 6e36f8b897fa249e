"""TransMLA: converts the weights of grouped-query models to multi-head latent attention."""

from kvjax.transmla.convert import METHODS, convert
from kvjax.transmla.factors import Factors, balanced_svd
from kvjax.transmla.inits import INITS, Init

__all__ = ["INITS", "METHODS", "Factors", "Init", "balanced_svd", "convert"]
