"""Mixture-CDF and Rosenblatt flows as pure functions of values and parameters (docs/math.md, sections 3 and 8).

Read `reference` first: every map in log space. `mixture`, `rosenblatt` and `vocabulary` hold the public functions.
"""

from tarflowlm.flow.numerics.layout import held_rows
from tarflowlm.flow.numerics.mixture import mixture_cdf, mixture_cdf_inverse, mixture_log_density
from tarflowlm.flow.numerics.normal import (
    log_component_densities,
    log_own_density,
    log_standard_normal,
    standard_normal_log_prob,
)
from tarflowlm.flow.numerics.rosenblatt import rosenblatt, rosenblatt_inverse
from tarflowlm.flow.numerics.vocabulary import (
    mixture_log_prob,
    mixture_log_prob_from_features,
    most_probable_component,
)
from tarflowlm.flow.transformer import wide_dtype

__all__ = [
    "held_rows",
    "log_component_densities",
    "log_own_density",
    "log_standard_normal",
    "mixture_cdf",
    "mixture_cdf_inverse",
    "mixture_log_density",
    "mixture_log_prob",
    "mixture_log_prob_from_features",
    "most_probable_component",
    "rosenblatt",
    "rosenblatt_inverse",
    "standard_normal_log_prob",
    "wide_dtype",
]
