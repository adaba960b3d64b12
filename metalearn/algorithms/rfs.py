"""RFS-simple: regularised logistic regression on frozen, normalised features.

Tian et al. (2020), "Rethinking few-shot image classification: A good embedding is all you need?".
"""

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.settings import above, at_least
from metalearn.tasks.types import Params, Support


def logistic_regression(z: Tensor, y: Tensor, way: int, cost: float, iterations: int) -> Tensor:
    """argmin_W 1/2 |W|^2 + cost * sum of cross-entropies, the last row of W (the offset) unpenalised.

    By Nesterov's accelerated gradient with the step 1 / L, for a fixed number of iterations (Nesterov 1983).
    Args: z [M, D], rows of norm at most 1; y int64 [M].
    Returns: [D + 1, N].
    """
    z = F.pad(z, (0, 1), value=1.0)
    target = F.one_hot(y, way).to(z.dtype)
    penalised = torch.ones_like(z[0]).unsqueeze(-1)
    penalised = torch.cat([penalised[:-1], torch.zeros_like(penalised[-1:])])
    # The Hessian of a cross-entropy is at most 1/2 z z', and |z|^2 at most 2.
    step = 1 / (1 + cost * len(z))
    weight = previous = z.new_zeros(z.shape[-1], way)
    for number in range(iterations):
        ahead = weight + number / (number + 3) * (weight - previous)
        gradient = penalised * ahead + cost * z.T @ ((z @ ahead).softmax(-1) - target)
        previous, weight = weight, ahead - step * gradient
    return weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class RFS(EmbeddingAlgorithm):
    """logits of a multinomial logistic regression on z / |z| (Tian et al. 2020, 3.2; their simple variant, no distillation).

    cost: weight of the cross-entropies against 1/2 |W|^2 (theirs: 1); iterations: of the solver.
    """

    sources: ClassVar[tuple[str, ...]] = ("batches",)
    is_iterative: ClassVar[bool] = True

    cost: float = above(0)
    iterations: int = at_least(1)

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Tensor:
        return logistic_regression(
            F.normalize(z.detach(), dim=-1), support.y, support.way, self.cost, self.iterations
        )

    def compare(self, weights: Params, learned: Tensor, z: Tensor) -> Tensor:
        return F.pad(F.normalize(z, dim=-1), (0, 1), value=1.0) @ learned
