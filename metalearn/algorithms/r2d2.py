"""R2D2: ridge regression on the support set, differentiated through its closed form."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.geometry import one_hot
from metalearn.algorithms.solvers import ridge
from metalearn.config.fields import above
from metalearn.tasks.types import Params, Spec, Support


@dataclasses.dataclass(frozen=True, kw_only=True)
class R2D2(EmbeddingAlgorithm):
    """Ridge regression from embeddings to one-hot labels, with meta-learned strength and scale.

    logits = scale * z W (Bertinetto et al. 2019, eq. 4 to 7). As in the authors' code, a constant 1
    is appended to each embedding, and squared errors are averaged over the support set, so one
    strength suits every support size. Departure: their bias that all logits share is left out,
    because it does not change the softmax.

    The logarithms of strength and scale are learned, so they stay positive.
    """

    strength: float = above(0)
    scale: float = above(0)

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        start = {"ridge.log_penalty": self.strength, "ridge.log_scale": self.scale}
        return {
            name: torch.full((), value, device=key.device).log() for name, value in start.items()
        }

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Tensor:
        y = one_hot(support.y, support.way).to(z.dtype)
        return ridge(
            F.pad(z, (0, 1), value=1.0), y, z.shape[0] * weights["ridge.log_penalty"].exp()
        )

    def compare(self, weights: Params, learned: Tensor, z: Tensor) -> Tensor:
        return weights["ridge.log_scale"].exp() * (F.pad(z, (0, 1), value=1.0) @ learned)
