"""SimpleShot: the nearest class mean after centring and normalising the features."""

import dataclasses

from torch import Tensor

from metalearn.algorithms.centred import CentredHead
from metalearn.algorithms.embedding import Examples
from metalearn.algorithms.geometry import squared_distance
from metalearn.algorithms.transductive import means_of
from metalearn.config.fields import above
from metalearn.tasks.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimpleShot(CentredHead):
    """logits = -scale |u - c_n|^2, c_n the mean of features u of a class (Wang et al. 2019, eq. 1).

    The paper has no scale; it changes probabilities only.
    """

    scale: float = above(0)

    def compare(self, weights: Params, learned: Examples, z: Tensor) -> Tensor:
        return -self.scale * squared_distance(self.normalised(weights, z), means_of(learned))
