"""Prototypical networks: the nearest class mean in embedding space.

Snell, Swersky and Zemel (2017), "Prototypical networks for few-shot learning".
"""

import dataclasses
from typing import ClassVar

from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.geometry import class_means, cosine, squared_distance
from metalearn.settings import above, choice
from metalearn.tasks.types import Params, Support


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProtoNet(EmbeddingAlgorithm):
    """logits = -d(z, class mean) (Snell et al. 2017, eq. 2).

    distance: "squared_euclidean", or "cosine" similarity; temperature: divides the logits.
    """

    sources: ClassVar[tuple[str, ...]] = ("episodes", "batches")

    distance: str = choice("squared_euclidean", "cosine")
    temperature: float = above(0)

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Tensor:
        return class_means(z, support.y, support.way)

    def compare(self, weights: Params, learned: Tensor, z: Tensor) -> Tensor:
        similarity = (
            cosine(z, learned) if self.distance == "cosine" else -squared_distance(z, learned)
        )
        return similarity / self.temperature
