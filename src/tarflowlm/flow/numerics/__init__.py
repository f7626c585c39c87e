"""Mixture-CDF and Rosenblatt flows as pure functions of (z, parameters)."""

from tarflowlm.flow.numerics.codebook import log_component_densities, log_own_density, wide_dtype
from tarflowlm.flow.numerics.density import mixture_log_density
from tarflowlm.flow.numerics.forward import mixture_cdf
from tarflowlm.flow.numerics.inverse import mixture_cdf_inverse
from tarflowlm.flow.numerics.layout import held_rows
from tarflowlm.flow.numerics.mixd import mixture_log_prob, mixture_log_prob_from_features, most_probable_component
from tarflowlm.flow.numerics.rosenblatt_map import rosenblatt, rosenblatt_inverse

__all__ = [
    "held_rows",
    "log_component_densities",
    "log_own_density",
    "mixture_cdf",
    "mixture_cdf_inverse",
    "mixture_log_density",
    "mixture_log_prob",
    "mixture_log_prob_from_features",
    "most_probable_component",
    "rosenblatt",
    "rosenblatt_inverse",
    "wide_dtype",
]
