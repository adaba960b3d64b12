"""RFS-simple: regularised logistic regression on frozen, normalised features."""

import dataclasses
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.solvers import logistic_regression
from metalearn.config.fields import above, at_least
from metalearn.tasks.types import Params, Support


@dataclasses.dataclass(frozen=True, kw_only=True)
class RFS(EmbeddingAlgorithm):
    """Multinomial logistic regression on z / |z| (Tian et al. 2020, 3.2).

    This is their simple variant, without distillation.

    Theirs: cost 1, 5 support copies.
    """

    sources: ClassVar[tuple[str, ...]] = ("batches",)
    is_iterative: ClassVar[bool] = True

    cost: float = above(0)
    iterations: int = at_least(1)
    support_copies: int = at_least(0, default=0)  # type: ignore[misc]

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Tensor:
        return logistic_regression(
            F.normalize(z.detach(), dim=-1), support.y, support.way, self.cost, self.iterations
        )

    def compare(self, weights: Params, learned: Tensor, z: Tensor) -> Tensor:
        return F.pad(F.normalize(z, dim=-1), (0, 1), value=1.0) @ learned
