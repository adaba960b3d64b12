"""RFS-simple: regularised logistic regression on frozen, normalised features.

Tian et al. (2020), "Rethinking few-shot image classification: A good embedding is all you need?"
"""

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.geometry import one_hot
from metalearn.config.fields import above, at_least
from metalearn.tasks.types import Params, Support


def logistic_regression(z: Tensor, y: Tensor, way: int, cost: float, iterations: int) -> Tensor:
    """Solve argmin_W 1/2 |W|^2 + cost * sum of cross-entropies.

    The last row of W [D + 1, N], the bias, has no penalty. The solver is Nesterov's accelerated
    gradient with step 1 / L (Nesterov 1983), for features z [M, D] with rows of norm at most 1 and
    labels y, int64 [M].
    """
    z = F.pad(z, (0, 1), value=1.0)
    target = one_hot(y, way).to(z.dtype)
    penalised = torch.ones_like(z[0]).unsqueeze(-1)
    penalised = torch.cat([penalised[:-1], torch.zeros_like(penalised[-1:])])
    # The Hessian of a cross-entropy is at most 1/2 z z', and |z|^2 is at most 2 with the constant.
    step = 1 / (1 + cost * z.shape[0])
    weight = previous = z.new_zeros(z.shape[-1], way)
    for number in range(iterations):
        ahead = weight + number / (number + 3) * (weight - previous)
        gradient = penalised * ahead + cost * z.T @ ((z @ ahead).softmax(-1) - target)
        previous, weight = weight, ahead - step * gradient
    return weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class RFS(EmbeddingAlgorithm):
    """Multinomial logistic regression on z / |z| (Tian et al. 2020, 3.2).

    This is their simple variant, without distillation.

    Attributes:
        cost: Weight of the cross-entropies against 1/2 |W|^2 (theirs: 1).
        iterations: Number of iterations of the solver.
        support_copies: Number of augmented copies of each support example (theirs: 5).
    """

    sources: ClassVar[tuple[str, ...]] = ("batches",)
    is_iterative: ClassVar[bool] = True

    cost: float = above(0)
    iterations: int = at_least(1)
    support_copies: int = at_least(0, default=0)  # type: ignore[assignment]

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Tensor:
        return logistic_regression(
            F.normalize(z.detach(), dim=-1), support.y, support.way, self.cost, self.iterations
        )

    def compare(self, weights: Params, learned: Tensor, z: Tensor) -> Tensor:
        return F.pad(F.normalize(z, dim=-1), (0, 1), value=1.0) @ learned
