"""FRN: reconstruct the feature map of a query from those of each class.

Wertheimer, Tang and Hariharan (2021), "Few-shot classification with feature map reconstruction
networks".
"""

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.geometry import one_hot
from metalearn.config.fields import above, at_least, choice
from metalearn.tasks import prng
from metalearn.tasks.types import Loss, Params, Query, Spec, State, Support

#: Least strength of the penalty, as in the authors' code.
_LEAST = 1e-6


class Reconstruction(NamedTuple):
    """Factors [N, C, C], or [N, M r, C] and [N, C, M r], of the matrices H, the last one first.

    Also the second loss, [].
    """

    factors: tuple[Tensor, ...]
    overlap: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class FRN(EmbeddingAlgorithm):
    """logits = -scale mean_r |q_r - rho q_r H_n|^2, over the r positions of a query's feature map.

    H_n = S' (S S' + l I)^-1 S = (S' S + l I)^-1 S' S is a ridge regression on the features
    S [K r, C] of all positions in class n, with l = K r / C exp(alpha) + 1e-6 and rho = exp(beta)
    (Wertheimer et al. 2021, eq. 4 to 10). alpha, beta (from 0) and scale are learned. Meta-training
    adds `auxiliary` times sum_{m < n} |S_m S_n'|^2 of normalised features (3.5). With fewer
    positions in the support set than channels, H_n = S' (S S' + l I)^-1 S is computed instead.

    On batches (their pre-training, 3.6), S_n is a learned map of each training class n, which is
    not divided, and alpha = beta = 0.

    Attributes:
        scale: Initial scale (theirs: 1). Its logarithm is learned.
        auxiliary: Weight of the second loss (theirs: 0.03).
        auxiliary_norm: What is divided by its norm there: the features of each "position", as in
            the paper, or of "all" positions and classes together, as in the authors' code.
        most_channels: Features with more channels are divided by the square root of their number
            (theirs: those of ResNet-12, with 640, and not those of Conv4, with 64). None: never.
    """

    sources: ClassVar[tuple[str, ...]] = ("episodes", "batches")

    scale: float = above(0)
    auxiliary: float = at_least(0)
    auxiliary_norm: str = choice("position", "all", default="all")
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

    def init_classifier(self, spec: Spec, size: int, key: Tensor) -> Params:
        """Create a feature map [C, r] for each training class."""
        channels = self.backbone.shape(spec.inputs)[0]
        shape = (spec.train_classes, channels, size // channels)
        return {"global.map": prng.normal(key, shape)}

    def classify(self, params: Params, z: Tensor) -> Tensor:
        """Compute logits [B, N] over training classes by their maps, with alpha = beta = 0."""
        maps, zero = params["global.map"], torch.zeros_like(params["head.alpha"])
        weights = params | {"head.alpha": zero, "head.beta": zero}
        factors = self.factors(weights, maps)
        return self.logits(weights, factors, self.maps(z, maps.shape[1]))

    def maps(self, z: Tensor, channels: int) -> Tensor:
        """Compute feature maps [M, C, r] from embeddings [M, C r]."""
        is_wide = self.most_channels is not None and channels > self.most_channels
        return z.unflatten(-1, (channels, -1)) / (channels**0.5 if is_wide else 1)

    def factors(self, weights: Params, maps: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        """Compute the factors of rho H_n from maps [M, C, r] and one-hot labels [M, N].

        Without labels, each map is a class.
        """
        channels, positions = maps.shape[1:]
        shots = torch.ones_like(maps[:, 0, 0]) if y is None else y.sum(0)
        strength = shots * positions / channels * weights["head.alpha"].exp() + _LEAST
        rho, rows = weights["head.beta"].exp(), maps.transpose(1, 2)
        size = min(channels, positions if y is None else len(maps) * positions)
        penalty = strength.view(-1, 1, 1) * torch.eye(size, dtype=maps.dtype, device=maps.device)
        if size < channels:
            if y is not None:  # 0 for other classes
                rows = y.T.repeat_interleave(positions, 1).unsqueeze(-1) * rows.flatten(0, 1)
            gram = rows @ rows.transpose(1, 2) + penalty
            return rho * torch.linalg.solve_ex(gram, rows)[0], rows.transpose(1, 2)
        gram = maps @ rows
        if y is not None:
            gram = torch.einsum("mn,mcd->ncd", y, gram)
        return (rho * torch.linalg.solve_ex(gram + penalty, gram)[0],)

    def overlap(self, maps: Tensor, y: Tensor) -> Tensor:
        """Compute the second loss [] from maps [M, C, r] and one-hot labels [M, N]."""
        rows = maps.transpose(1, 2).flatten(0, 1)
        own = y.repeat_interleave(maps.shape[-1], 0)
        dims = (-1,) if self.auxiliary_norm == "position" else (-2, -1)
        norm = torch.linalg.vector_norm(rows, dim=dims, keepdim=True)
        rows = rows / norm.clamp_min(torch.finfo(rows.dtype).eps ** 2)
        return ((1 - own @ own.T) * (rows @ rows.T).square()).sum() / 2

    def logits(self, weights: Params, factors: tuple[Tensor, ...], maps: Tensor) -> Tensor:
        """Compute logits [Q, N] of maps [Q, C, r] from factors."""
        rows = reconstructed = maps.transpose(1, 2).flatten(0, 1)
        for factor in factors:  # [Q r, C] @ [N, C, C] is one matrix product
            reconstructed = reconstructed @ factor.transpose(1, 2)
        error = (rows - reconstructed).square().sum(-1)
        error = error.unflatten(-1, (len(maps), -1)).mean(-1)
        return -weights["head.log_scale"].exp() * error.T

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Reconstruction:
        maps = self.maps(z, len(weights["head.map"]))
        y = one_hot(support.y, support.way).to(z.dtype)
        return Reconstruction(self.factors(weights, maps, y), self.overlap(maps, y))

    def compare(self, weights: Params, learned: Reconstruction, z: Tensor) -> Tensor:
        return self.logits(weights, learned.factors, self.maps(z, len(weights["head.map"])))

    def embedding_loss(
        self, weights: Params, learned: Reconstruction, z: Tensor, query: Query, statistics: Params
    ) -> Loss:
        loss = super().embedding_loss(weights, learned, z, query, statistics)
        return loss._replace(value=loss.value + self.auxiliary * learned.overlap)
