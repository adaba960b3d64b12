"""Prototypical networks: the nearest class mean in embedding space.

Snell, Swersky and Zemel (2017), "Prototypical networks for few-shot learning".
"""

import dataclasses
from typing import ClassVar

from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.geometry import class_means, cosine, squared_distance
from metalearn.config.fields import above, choice
from metalearn.tasks.types import Params, Support


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProtoNet(EmbeddingAlgorithm):
    """Classify by the distance to the class means: logits = -d(z, c_n) (Snell et al. 2017, eq. 2).

    Attributes:
        distance: "squared_euclidean", or "cosine" for logits that are cosine similarities.
        temperature: Divides the logits.
    """

    sources: ClassVar[tuple[str, ...]] = ("episodes", "batches")

    distance: str = choice("squared_euclidean", "cosine")
    temperature: float = above(0)

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Tensor:
        """Compute the class means [N, D]."""
        return class_means(z, support.y, support.way)

    def compare(self, weights: Params, learned: Tensor, z: Tensor) -> Tensor:
        """Compute the similarity of each query to each class mean, divided by the temperature."""
        similarity = (
            cosine(z, learned) if self.distance == "cosine" else -squared_distance(z, learned)
        )
        return similarity / self.temperature
