"""Mixture-CDF and Rosenblatt flows as pure functions (docs/math.md, sections 3 and 8).

Read `reference` first: every map in log space. `mixture` and `vocabulary` hold the public
functions, which take any leading shape. Their implementations take rows:

    N rows (n of them in a chunk), K components, d channels, M pairs of a row and a component
    scalar mixtures:    z, u [N];     log_w, mean, log_std [N, K], or [1, K] shared by all rows
    codebook mixtures:  z, u [N, d];  log_w [N, K], mean [K, d], log_std [K]

log_w need not be normalised. Densities are in nats. Q is the upper tail of the standard normal.
"""

from tarflowlm.flow.numerics.mixture import (
    COMPILED,
    REFERENCE,
    Maps,
    choose_maps,
    mixture_cdf,
    mixture_cdf_inverse,
    mixture_log_density,
    rosenblatt,
    rosenblatt_inverse,
)
from tarflowlm.flow.numerics.normal import (
    log_component_densities,
    log_own_density,
    log_standard_normal,
    standard_normal_log_prob,
)
from tarflowlm.flow.numerics.vocabulary import (
    component_finder,
    head_sums,
    log_normaliser,
    mixture_log_prob,
    mixture_log_prob_from_features,
)
from tarflowlm.flow.numerics.vocabulary_rosenblatt import LogWeights

__all__ = [
    "COMPILED",
    "REFERENCE",
    "LogWeights",
    "Maps",
    "choose_maps",
    "component_finder",
    "head_sums",
    "log_component_densities",
    "log_normaliser",
    "log_own_density",
    "log_standard_normal",
    "mixture_cdf",
    "mixture_cdf_inverse",
    "mixture_log_density",
    "mixture_log_prob",
    "mixture_log_prob_from_features",
    "rosenblatt",
    "rosenblatt_inverse",
    "standard_normal_log_prob",
]
