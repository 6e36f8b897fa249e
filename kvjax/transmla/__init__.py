"""TransMLA: converts the weights of grouped-query models to multi-head latent attention."""

from kvjax.transmla.allocation import allocate_sizes, choose_fold, choose_rope_dim
from kvjax.transmla.calibration import LayerStats, Stats, calibrate
from kvjax.transmla.convert import METHODS, convert
from kvjax.transmla.distill import distill
from kvjax.transmla.factors import Factors, balanced_svd
from kvjax.transmla.inits import INITS, Init
from kvjax.transmla.recipe import BEST, UNBIASED, Recipe, published

__all__ = [
    "BEST",
    "INITS",
    "METHODS",
    "UNBIASED",
    "Factors",
    "Init",
    "LayerStats",
    "Recipe",
    "Stats",
    "allocate_sizes",
    "balanced_svd",
    "calibrate",
    "choose_fold",
    "choose_rope_dim",
    "convert",
    "distill",
    "published",
]
