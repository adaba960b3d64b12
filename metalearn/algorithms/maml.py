"""MAML; by its settings also first-order MAML, ANIL, BOIL and L2-regularised MAML.

Finn, Abbeel and Levine (2017), "Model-agnostic meta-learning for fast adaptation of deep networks".
"""

import dataclasses

from metalearn.algorithms.gradient import GradientAdaptation


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAML(GradientAdaptation):
    """The initialisation of backbone and head is meta-learned, and nothing else (Finn et al. 2017, algorithm 1)."""
