"""MetaOptNet: a support vector machine on the support set, differentiated at its solution."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm, Examples
from metalearn.algorithms.geometry import one_hot
from metalearn.algorithms.solvers import svm_dual
from metalearn.config.fields import above, at_least
from metalearn.tasks.types import Params, Spec, Support


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaOptSVM(EmbeddingAlgorithm):
    """logits = scale * z w_n, with the support vector machine w_n = sum_i a_in z_i (`svm_dual`).

    The logarithm of the scale is learned. `diagonal` is added to the diagonal of the inner products
    in the dual problem (paper: 0; the authors' code: 1).

    Theirs: cost C 0.1, 15 iterations, initial scale 1.
    """

    is_iterative: ClassVar[bool] = True

    cost: float = above(0)
    iterations: int = at_least(1)
    scale: float = above(0)
    diagonal: float = at_least(0, default=0.0)

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        return {"head.log_scale": torch.full((), self.scale, device=key.device).log()}

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Examples:
        y = one_hot(support.y, support.way).to(z.dtype)
        gram = z @ z.T + self.diagonal * torch.eye(len(z), dtype=z.dtype, device=z.device)
        return Examples(z, svm_dual(gram, y, self.cost, self.iterations))

    def compare(self, weights: Params, learned: Examples, z: Tensor) -> Tensor:
        return weights["head.log_scale"].exp() * (z @ learned.z.T @ learned.y)
