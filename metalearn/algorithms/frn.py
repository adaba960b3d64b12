"""FRN: reconstruct the feature map of a query from those of each class.

Wertheimer, Tang and Hariharan (2021), "Few-shot classification with feature map reconstruction
networks".
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.geometry import one_hot
from metalearn.config.fields import above, at_least
from metalearn.tasks.types import Loss, Params, Query, Spec, State, Support

#: Least strength of the penalty, as in the authors' code.
_LEAST = 1e-6


class Reconstruction(NamedTuple):
    """Matrices [N, C, C] that reconstruct features, and how much the classes' features overlap."""

    matrices: Tensor
    overlap: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class FRN(EmbeddingAlgorithm):
    """logits = -scale mean_r |q_r - rho q_r H_n|^2, over the r positions of a query's feature map.

    H_n = S' (S S' + l I)^-1 S = (S' S + l I)^-1 S' S is a ridge regression on the features
    S [K r, C] of all positions in class n, with l = K r / C exp(alpha) + 1e-6 and rho = exp(beta)
    (Wertheimer et al. 2021, eq. 4 to 10). alpha, beta (from 0) and scale are learned. Meta-training
    adds `auxiliary` times sum_{m < n} |S_m S_n'|^2 / |S|^4 (3.5); as in the authors' code, |S| is
    the norm of the features of all classes (in the paper, that of each position).

    Departure: the backbone is trained from the start, without their pre-training.

    Attributes:
        scale: Initial scale (theirs: 1, with features of ResNet-12 divided by the square root of
            640). Its logarithm is learned.
        auxiliary: Weight of the second loss (theirs: 0.03).
    """

    scale: float = above(0)
    auxiliary: float = at_least(0)

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        """Create alpha, beta and the logarithm of the scale."""
        zero = torch.zeros((), device=key.device)
        scale = torch.full((), self.scale, device=key.device).log()
        return {"head.alpha": zero, "head.beta": zero.clone(), "head.log_scale": scale}

    def init(self, spec: Spec, key: Tensor) -> State:
        """Create the state; the number of rows of "head.map" is the number of channels."""
        state = super().init(spec, key)
        own = torch.zeros(self.backbone.shape(spec.inputs)[0], 0, device=key.device)
        return State(state.params, state.buffers | {"head.map": own})

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Reconstruction:
        channels = len(weights["head.map"])
        maps, y = z.unflatten(-1, (channels, -1)), one_hot(support.y, support.way).to(z.dtype)
        gram = torch.einsum("mn,mcr,mdr->ncd", y, maps, maps)
        strength = y.sum(0) * maps.shape[-1] / channels * weights["head.alpha"].exp() + _LEAST
        penalty = strength.view(-1, 1, 1) * torch.eye(channels, dtype=z.dtype, device=z.device)
        matrices = weights["head.beta"].exp() * torch.linalg.solve_ex(gram + penalty, gram)[0]
        overlap = (gram.sum(0).square().sum() - gram.square().sum()) / 2
        overlap = overlap / maps.square().sum().square().clamp_min(torch.finfo(z.dtype).tiny)
        return Reconstruction(matrices, overlap)

    def compare(self, weights: Params, learned: Reconstruction, z: Tensor) -> Tensor:
        maps = z.unflatten(-1, (len(weights["head.map"]), -1)).unsqueeze(1)
        error = (maps - learned.matrices @ maps).square().sum(-2).mean(-1)
        return -weights["head.log_scale"].exp() * error

    def embedding_loss(
        self, weights: Params, learned: Reconstruction, z: Tensor, query: Query, statistics: Params
    ) -> Loss:
        loss = super().embedding_loss(weights, learned, z, query, statistics)
        return loss._replace(value=loss.value + self.auxiliary * learned.overlap)
