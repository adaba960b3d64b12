"""MetaOptNet: a support vector machine on the support set, differentiated at its solution.

Lee, Maji, Ravichandran and Soatto (2019), "Meta-learning with differentiable convex optimization".
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm, Examples
from metalearn.algorithms.geometry import one_hot
from metalearn.config.fields import above, at_least
from metalearn.tasks.types import Params, Spec, Support

#: Each step aims at this share of the duality gap.
_CENTRING = 0.1
#: Share of the way to the boundary that a step takes at most.
_STEP = 0.99
#: Least duality gap per constraint that a step aims at.
_LEAST = 1e-13


def svm_dual(gram: Tensor, y: Tensor, cost: float, iterations: int) -> Tensor:
    """Solve the dual of the multi-class support vector machine of Crammer and Singer (2001).

    min_a 1/2 sum_n a_n' G a_n - sum_i a_i,y_i with a_in <= cost [n = y_i] and sum_n a_in = 0 (Lee
    et al. 2019, eq. 8), by a primal-dual interior-point method in float64. The gradient with
    respect to G is that of the optimality conditions (implicit function theorem, 3.2), not of the
    steps. G are inner products [M, M], y one-hot labels [M, N]; the result a is [M, N].
    """
    examples, way = y.shape
    size = examples * way
    y, given = y.double(), gram.double()
    eye = torch.eye(max(examples, way), dtype=y.dtype, device=y.device)
    hessian = torch.kron(given.detach(), eye[:way, :way])
    sums = torch.kron(eye[:examples, :examples], torch.ones_like(eye[:1, :way]))
    linear, bound = y.flatten(), cost * y.flatten()
    x = (cost / (2 * way) * (way * y - 1)).flatten()  # inside all constraints
    slack, dual, shift = bound - x, torch.ones_like(x), torch.zeros_like(y[:, 0])

    def solve(rest: Tensor) -> tuple[Tensor, Tensor]:
        corner = torch.zeros_like(eye[:examples, :examples])
        upper = torch.cat([hessian + torch.diag_embed(dual / slack), sums.T], 1)
        matrix = torch.cat([upper, torch.cat([sums, corner], 1)])
        solution = torch.linalg.solve_ex(matrix, torch.cat([rest, torch.zeros_like(shift)]))[0]
        return solution[:size], solution[size:]

    for _ in range(iterations):
        target = _CENTRING * (slack @ dual / size).clamp_min(_LEAST)
        move, shift = solve(linear - hessian @ x - target / slack)
        dual_move = (target + dual * move) / slack - dual
        ratios = torch.cat([move / slack, -dual_move / dual])
        step = _STEP / ratios.amax().clamp_min(_STEP)
        x, slack, dual = x + step * move, slack - step * move, dual + step * dual_move
    # Zero, but its gradient is that of the optimality conditions.
    residual = (given @ x.view(examples, way)).flatten() - hessian @ x
    return (x - solve(residual)[0]).view(examples, way).to(gram.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaOptSVM(EmbeddingAlgorithm):
    """logits = scale * z w_n, with the support vector machine w_n = sum_i a_in z_i (`svm_dual`).

    Attributes:
        cost: C (theirs: 0.1).
        iterations: Steps of the interior-point method (theirs: 15).
        scale: Initial scale (theirs: 1). Its logarithm is learned.
    """

    is_iterative: ClassVar[bool] = True

    cost: float = above(0)
    iterations: int = at_least(1)
    scale: float = above(0)

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        return {"head.log_scale": torch.full((), self.scale, device=key.device).log()}

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Examples:
        y = one_hot(support.y, support.way).to(z.dtype)
        return Examples(z, svm_dual(z @ z.T, y, self.cost, self.iterations))

    def compare(self, weights: Params, learned: Examples, z: Tensor) -> Tensor:
        return weights["head.log_scale"].exp() * (z @ learned.z.T @ learned.y)
