"""Siamese network: the probability that two pictures show the same class.

Koch, Zemel and Salakhutdinov (2015), "Siamese neural networks for one-shot image recognition".
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn import random
from metalearn.algorithms.embedding import EmbeddingAlgorithm, Examples
from metalearn.types import Labelled, Loss, Params, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Siamese(EmbeddingAlgorithm):
    """p(same) = sigmoid(sum_j alpha_j |z_j(x) - z_j(x_i)| + bias), trained by cross-entropy over all pairs of a query and a support
    example (Koch et al. 2015, 3.1 and 3.2). A query's logit of a class is its highest over the class's examples.

    Departures: z is the embedding itself, without the paper's last layer, linear with a sigmoid. All pairs of an episode count
    alike, so that the few that are hard to tell apart matter; the paper draws as many pairs of one class as of two.
    """

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        alpha = (0.2 * random.normal(key, (size,)) - 1) * size**-0.5  # a distance from the start: alike is near
        return {"pair.alpha": alpha, "pair.bias": torch.ones((), device=key.device)}

    def learn(self, meta: Params, z: Tensor, support: Labelled) -> Examples:
        return Examples(z, F.one_hot(support.y, support.way).to(z.dtype))

    def pairs(self, meta: Params, learned: Examples, z: Tensor) -> Tensor:
        """Logits [Q, M] that query and support example are of the same class."""
        distance = (z[:, None] - learned.z).abs()
        return distance @ meta["pair.alpha"] + meta["pair.bias"]

    def compare(self, meta: Params, learned: Examples, z: Tensor) -> Tensor:
        pairs = self.pairs(meta, learned, z)
        return torch.where(learned.y.T > 0, pairs[:, None, :], -torch.inf).amax(-1)

    def judged(self, meta: Params, learned: Examples, z: Tensor, query: Labelled, statistics: Params) -> Loss:
        pairs = self.pairs(meta, learned, z)
        same = F.one_hot(query.y, query.way).to(pairs.dtype) @ learned.y.T
        value = F.binary_cross_entropy_with_logits(pairs, same)
        return self.scored(value, self.compare(meta, learned, z), query.y, statistics)
