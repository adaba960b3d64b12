"""MAML, and with other settings first-order MAML, ANIL, BOIL and L2-regularised MAML."""

import dataclasses

from metalearn.algorithms.gradient import GradientAdaptation


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAML(GradientAdaptation):
    """Meta-learn only the initialisation of backbone and head (Finn et al. 2017, algorithm 1)."""
