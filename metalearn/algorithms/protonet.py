"""Prototypical networks: the nearest class mean in embedding space."""

import dataclasses
from typing import ClassVar

from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.geometry import class_means, cosine, squared_distance
from metalearn.config.fields import above, choice
from metalearn.tasks.types import Params, Support

#: Temperature of cosines, which do not grow with the number of features.
_COSINE_TEMPERATURE = 0.1


def distance_scale(z_MD: Tensor) -> float:
    """Return what squared distances of embeddings are divided by, so that any D gives soft logits.

    D / 4 was the best on validation classes of D, D / 4, sqrt(D), 1 and a learned scale that starts
    at D (scripts/benchmark_scales.py).
    """
    return z_MD.shape[-1] / 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProtoNet(EmbeddingAlgorithm):
    """Classify by the distance to the class means: logits = -d(z, c_n) (Snell et al. 2017, eq. 2).

    The default temperature is a quarter of the number of features for squared distances, which grow
    with it, and 0.1 for cosines.
    """

    sources: ClassVar[tuple[str, ...]] = ("episodes", "batches")

    distance: str = choice("squared_euclidean", "cosine")
    temperature: float | None = above(0)

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Tensor:
        return class_means(z, support.y, support.way)

    def compare(self, weights: Params, learned: Tensor, z: Tensor) -> Tensor:
        if self.distance == "cosine":
            return cosine(z, learned) / (self.temperature or _COSINE_TEMPERATURE)
        return -squared_distance(z, learned) / (self.temperature or distance_scale(z))
