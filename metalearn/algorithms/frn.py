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
    """Factors [N, C, C], or [N, M r, C] and [N, C, M r], of the matrices H, the last one first.

    Also how much the classes' features overlap, [].
    """

    factors: tuple[Tensor, ...]
    overlap: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class FRN(EmbeddingAlgorithm):
    """logits = -scale mean_r |q_r - rho q_r H_n|^2, over the r positions of a query's feature map.

    H_n = S' (S S' + l I)^-1 S = (S' S + l I)^-1 S' S is a ridge regression on the features
    S [K r, C] of all positions in class n, with l = K r / C exp(alpha) + 1e-6 and rho = exp(beta)
    (Wertheimer et al. 2021, eq. 4 to 10). alpha, beta (from 0) and scale are learned. Meta-training
    adds `auxiliary` times sum_{m < n} |S_m S_n'|^2 / |S|^4 (3.5); as in the authors' code, |S| is
    the norm of the features of all classes (in the paper, that of each position). With fewer
    positions in the support set than channels, H_n = S' (S S' + l I)^-1 S is computed instead.

    Departure: the backbone is trained from the start, without their pre-training.

    Attributes:
        scale: Initial scale (theirs: 1). Its logarithm is learned.
        auxiliary: Weight of the second loss (theirs: 0.03).
        most_channels: Features with more channels are divided by the square root of their number
            (theirs: those of ResNet-12, with 640, and not those of Conv4, with 64). None: never.
    """

    scale: float = above(0)
    auxiliary: float = at_least(0)
    most_channels: int | None = at_least(1, default=None)

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

    def maps(self, weights: Params, z: Tensor) -> Tensor:
        """Compute feature maps [M, C, r] from embeddings [M, C r]."""
        channels = len(weights["head.map"])
        is_wide = self.most_channels is not None and channels > self.most_channels
        return z.unflatten(-1, (channels, -1)) / (channels**0.5 if is_wide else 1)

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Reconstruction:
        maps, y = self.maps(weights, z), one_hot(support.y, support.way).to(z.dtype)
        channels, positions = maps.shape[1:]
        rows = maps.transpose(1, 2).flatten(0, 1)  # [M r, C]
        strength = y.sum(0) * positions / channels * weights["head.alpha"].exp() + _LEAST
        rho, size = weights["head.beta"].exp(), min(rows.shape)
        penalty = strength.view(-1, 1, 1) * torch.eye(size, dtype=z.dtype, device=z.device)
        factors: tuple[Tensor, ...]
        if size < channels:
            own = y.T.repeat_interleave(positions, 1).unsqueeze(-1) * rows  # 0 for other classes
            gram = own @ own.transpose(1, 2)
            factors = (rho * torch.linalg.solve_ex(gram + penalty, own)[0], own.transpose(1, 2))
        else:
            gram = torch.einsum("mn,mcr,mdr->ncd", y, maps, maps)
            factors = (rho * torch.linalg.solve_ex(gram + penalty, gram)[0],)
        overlap = ((rows @ rows.T).square().sum() - gram.square().sum()) / 2
        overlap = overlap / rows.square().sum().square().clamp_min(torch.finfo(z.dtype).tiny)
        return Reconstruction(factors, overlap)

    def compare(self, weights: Params, learned: Reconstruction, z: Tensor) -> Tensor:
        maps = reconstructed = self.maps(weights, z).unsqueeze(1)
        for factor in learned.factors:
            reconstructed = factor @ reconstructed
        error = (maps - reconstructed).square().sum(-2).mean(-1)
        return -weights["head.log_scale"].exp() * error

    def embedding_loss(
        self, weights: Params, learned: Reconstruction, z: Tensor, query: Query, statistics: Params
    ) -> Loss:
        loss = super().embedding_loss(weights, learned, z, query, statistics)
        return loss._replace(value=loss.value + self.auxiliary * learned.overlap)
