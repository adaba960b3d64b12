"""Siamese network: the probability that two images show the same class."""

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm, Examples
from metalearn.algorithms.geometry import one_hot
from metalearn.tasks import prng
from metalearn.tasks.types import Loss, Params, Query, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Siamese(EmbeddingAlgorithm):
    """A learned weighted L1 distance that decides whether two examples have the same class.

    p(same) = sigmoid(sum_j alpha_j |z_j(x) - z_j(x_i)| + bias) is trained by cross-entropy over all
    pairs of a query and a support example (Koch et al. 2015, 3.1 and 3.2). The logit of a class is
    the maximum over its support examples.

    Departures: z is the embedding itself, without the paper's last layer, linear with a sigmoid.
    All pairs of an episode have equal weight, so the few hard pairs count. The paper samples as
    many pairs of one class as of two.
    """

    uses_loss: ClassVar[bool] = False
    accepts_soft_labels: ClassVar[bool] = False

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        """Create alpha, negative at first so that near embeddings are similar, and the bias."""
        alpha = (0.2 * prng.normal(key, (size,)) - 1) * size**-0.5
        return {"pair.alpha": alpha, "pair.bias": torch.ones((), device=key.device)}

    def pairs(self, weights: Params, learned: Examples, z: Tensor) -> Tensor:
        """Compute the logits [Q, M] that a query and a support example have the same class."""
        return self.similarity(weights, z, learned.z)

    def similarity(self, weights: Params, z: Tensor, others: Tensor) -> Tensor:
        """Compute the logit of each pair of embeddings [Q, D] and [M, D]: [Q, M]."""
        distance = (z[:, None] - others).abs()
        return distance @ weights["pair.alpha"] + weights["pair.bias"]

    def compare(self, weights: Params, learned: Examples, z: Tensor) -> Tensor:
        pairs = self.pairs(weights, learned, z)
        return torch.where(learned.y.T > 0, pairs[:, None, :], -torch.inf).amax(-1)

    def embedding_loss(
        self, weights: Params, learned: Examples, z: Tensor, query: Query, statistics: Params
    ) -> Loss:
        pairs = self.pairs(weights, learned, z)
        same = one_hot(query.y, learned.y.shape[-1]).to(pairs.dtype) @ learned.y.T
        value = F.binary_cross_entropy_with_logits(pairs, same)
        return self.supervised.make_loss(
            value, self.compare(weights, learned, z), query.y, statistics
        )
