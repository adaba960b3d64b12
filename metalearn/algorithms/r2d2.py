"""R2D2: a ridge regression on the support set, differentiated through its closed form.

Bertinetto, Henriques, Torr and Vedaldi (2019), "Meta-learning with differentiable closed-form solvers".
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.settings import above
from metalearn.tasks.types import Params, Spec, Support


def ridge(z: Tensor, y: Tensor, strength: Tensor) -> Tensor:
    """argmin_W |z W - y|^2 + strength |W|^2 = z' (z z' + strength I)^-1 y (Bertinetto et al. 2019, eq. 4 and 6, by Woodbury's
    identity a system of the size of the support set).

    Args: z [M, D]; y [M, N]; strength [], positive.
    Returns: [D, N].
    """
    gram = z @ z.T
    gram = gram.to(
        torch.promote_types(gram.dtype, torch.float32)
    )  # no system is solved in bfloat16
    gram = gram + strength * torch.eye(len(z), dtype=gram.dtype, device=z.device)
    # Unlike solve, solve_ex never waits for the device to look for errors.
    return z.T @ torch.linalg.solve_ex(gram, y.to(gram.dtype))[0].to(z.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class R2D2(EmbeddingAlgorithm):
    """logits = scale * z W, W the ridge regression from embeddings to one-hot labels (Bertinetto et al. 2019, eq. 4 to 7);
    its strength and the scale are meta-learned.

    strength, scale: where they start; both are learned by their logarithm, so they stay positive. The strength is that of an
    example: the squared errors are averaged over the support set, as in the authors' code, so that it suits every size of it.
    A one stands beside each embedding, as in the authors' code. Their bias of all logits alike is left out: no softmax sees it.
    """

    strength: float = above(0)
    scale: float = above(0)

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        start = {"ridge.log_penalty": self.strength, "ridge.log_scale": self.scale}
        return {
            name: torch.full((), value, device=key.device).log() for name, value in start.items()
        }

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Tensor:
        y = F.one_hot(support.y, support.way).to(z.dtype)
        return ridge(F.pad(z, (0, 1), value=1.0), y, len(z) * weights["ridge.log_penalty"].exp())

    def compare(self, weights: Params, learned: Tensor, z: Tensor) -> Tensor:
        return weights["ridge.log_scale"].exp() * (F.pad(z, (0, 1), value=1.0) @ learned)
