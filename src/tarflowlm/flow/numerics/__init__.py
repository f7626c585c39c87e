"""Mixture-CDF and Rosenblatt flows as pure functions of (z, parameters)."""

from tarflowlm.flow.numerics._first import (
    log_component_densities,
    mixture_cdf,
    mixture_cdf_inverse,
    mixture_log_density,
    mixture_log_prob,
    mixture_log_prob_from_features,
    rosenblatt,
    rosenblatt_inverse,
)

__all__ = [
    "log_component_densities",
    "mixture_cdf",
    "mixture_cdf_inverse",
    "mixture_log_density",
    "mixture_log_prob",
    "mixture_log_prob_from_features",
    "rosenblatt",
    "rosenblatt_inverse",
]
