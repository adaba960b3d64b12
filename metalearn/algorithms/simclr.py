"""SimCLR: a backbone trained without labels, to recognise two changed copies of one image."""

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.geometry import class_means, squared_distance
from metalearn.algorithms.params import select
from metalearn.algorithms.protonet import distance_scale
from metalearn.config.fields import above, at_least
from metalearn.tasks import prng
from metalearn.tasks.types import Batch, Loss, Params, Spec, State, Support


def contrast(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute the logits whose cross-entropy is NT-Xent (Chen et al. 2020, eq. 1).

    Rows 2i and 2i + 1 of the projections z [2B, P] are of one image. Return logits [2B, 2B], -inf
    for a row with itself, and the row of the other view, int64 [2B].
    """
    u = F.normalize(z, dim=-1)
    row = torch.arange(len(z), device=z.device)
    return (u @ u.T / temperature).masked_fill(row[:, None] == row, -torch.inf), row ^ 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimCLR(EmbeddingAlgorithm):
    """Train on two augmented views of each image by NT-Xent; test by prototypes.

    loss_i = -log exp(s_ij / t) / sum over k != i of exp(s_ik / t), for the views i and j of one
    image; s are cosines of projections W2 relu(W1 z + b1) + b2 of the embeddings z (Chen et al.
    2020, eq. 1, 2.1 and algorithm 1). The projection is not used in tests. The logged accuracy is
    the share of views whose nearest other one is of the same image.

    Departures: Adam instead of LARS; the augmentations are those of `augment.ops`.
    """

    sources: ClassVar[tuple[str, ...]] = ("batches",)
    num_views: ClassVar[int] = 2
    uses_loss: ClassVar[bool] = False
    accepts_soft_labels: ClassVar[bool] = False

    projection: int = at_least(1)
    contrast_temperature: float = above(0)

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Tensor:
        return class_means(z, support.y, support.way)

    def compare(self, weights: Params, learned: Tensor, z: Tensor) -> Tensor:
        return -squared_distance(z, learned) / distance_scale(z)

    def init_classifier(self, spec: Spec, size: int, key: Tensor) -> Params:
        """Create the projection head, in the place of a classifier."""
        params: Params = {}
        for number, outputs in enumerate((size, self.projection)):
            weight = prng.normal(prng.fold_in(key, number), (outputs, size)) * (2 / size) ** 0.5
            params[f"projection.weight{number}"] = weight
            params[f"projection.bias{number}"] = torch.zeros(outputs, device=key.device)
        return params

    def batch_loss(self, state: State, batch: Batch, progress: Tensor) -> Loss:
        net, head = select(state.params, "net"), select(state.params, "projection")
        z, statistics = self.normalisation.embed_batch(state, net, batch.x, batch.key)
        hidden = F.relu(F.linear(z, head["weight0"], head["bias0"]))
        logits, other = contrast(
            F.linear(hidden, head["weight1"], head["bias1"]), self.contrast_temperature
        )
        return self.supervised.make_loss(F.cross_entropy(logits, other), logits, other, statistics)
