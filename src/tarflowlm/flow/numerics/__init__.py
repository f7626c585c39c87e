"""Mixture-CDF and Rosenblatt flows as pure functions of values and parameters (docs/math.md,
sections 3 and 8).

Read `reference` first: every map in log space. `mixture`, `rosenblatt` and `vocabulary` hold the
public functions.
"""

from tarflowlm.flow.numerics.mixture import mixture_cdf as mixture_cdf
from tarflowlm.flow.numerics.mixture import mixture_cdf_inverse as mixture_cdf_inverse
from tarflowlm.flow.numerics.mixture import mixture_log_density as mixture_log_density
from tarflowlm.flow.numerics.normal import log_component_densities as log_component_densities
from tarflowlm.flow.numerics.normal import log_own_density as log_own_density
from tarflowlm.flow.numerics.normal import log_standard_normal as log_standard_normal
from tarflowlm.flow.numerics.normal import standard_normal_log_prob as standard_normal_log_prob
from tarflowlm.flow.numerics.rosenblatt import rosenblatt as rosenblatt
from tarflowlm.flow.numerics.rosenblatt import rosenblatt_inverse as rosenblatt_inverse
from tarflowlm.flow.numerics.vocabulary import mixture_log_prob as mixture_log_prob
from tarflowlm.flow.numerics.vocabulary import (
    mixture_log_prob_from_features as mixture_log_prob_from_features,
)
from tarflowlm.flow.numerics.vocabulary import most_probable_component as most_probable_component
