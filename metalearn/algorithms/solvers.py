"""Solvers with a fixed number of operations, so that heads and inner loops can be batched."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad

from metalearn.algorithms.geometry import one_hot
from metalearn.algorithms.params import dot
from metalearn.tasks.types import Params

#: Each step aims at this share of the duality gap.
_CENTRING = 0.1
#: Share of the way to the boundary that a step takes at most.
_STEP = 0.99
#: Least duality gap per constraint that a step aims at.
_LEAST = 1e-13


def ridge(z: Tensor, y: Tensor, strength: Tensor) -> Tensor:
    """Solve the ridge regression argmin_W |z W - y|^2 + strength |W|^2.

    W = z' (z z' + strength I)^-1 y (Bertinetto et al. 2019, eq. 4 and 6). By Woodbury's identity,
    the system has the size of the support set. [M, D], [M, N], [] -> [D, N]; strength > 0.
    """
    gram = z @ z.T
    # torch solves no linear system in bfloat16.
    gram = gram.to(torch.promote_types(gram.dtype, torch.float32))
    gram = gram + strength * torch.eye(z.shape[0], dtype=gram.dtype, device=z.device)
    # Unlike solve, solve_ex does not synchronise with the device to check for errors.
    return z.T @ torch.linalg.solve_ex(gram, y.to(gram.dtype))[0].to(z.dtype)


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


def transport(cost: Tensor, scale: float, iterations: int) -> Tensor:
    """Compute the transport plan P that minimises sum P cost - H(P) / scale (Cuturi 2013).

    Its rows sum to 1, and its columns to Q / N: each class has the same number of queries.
    Sinkhorn's scaling of exp(-scale cost), of rows and at last of columns, is in float64, so that
    small values do not vanish. Costs and P are [Q, N].
    """
    kernel = (-scale * (cost - cost.amin(-1, keepdim=True)).double()).exp()
    column = kernel.new_ones(kernel.shape[-1])
    for _ in range(iterations):
        row = 1 / (kernel @ column)
        column = len(kernel) / len(column) / (row @ kernel)
    plan = row.unsqueeze(-1) * kernel * column
    return plan.clamp_min(torch.finfo(cost.dtype).tiny).to(cost.dtype)


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int, lr: float) -> Tensor:
    """Minimise a loss [] of a tensor by Adam with its usual settings (Kingma and Ba 2015)."""
    value, mean, square = start, torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, steps + 1):
        gradient = grad(loss)(value)
        mean, square = mean.lerp(gradient, 0.1), square.lerp(gradient.square(), 0.001)
        scale = (square / (1 - 0.999**step)).sqrt() + 1e-8
        value = value - lr * mean / (1 - 0.9**step) / scale
    return value


def conjugate_gradients(product: Callable[[Params], Params], b: Params, steps: int) -> Params:
    """Solve product(x) = b approximately by conjugate gradients (Hestenes and Stiefel 1952).

    `product` multiplies a tree by a symmetric matrix. A residual that is exactly zero stays zero.
    Return x after a fixed number of steps from x = 0; with 0 steps, b itself.
    """
    if steps == 0:
        return b
    x = {name: torch.zeros_like(value) for name, value in b.items()}
    residual = direction = b
    squared = dot(residual, residual)

    def ratio(above: Tensor, below: Tensor) -> Tensor:
        return torch.where(below == 0, 0.0, above / torch.where(below == 0, 1.0, below))

    for _ in range(steps):
        multiplied = product(direction)
        size = ratio(squared, dot(direction, multiplied))
        x = {name: x[name] + size * direction[name] for name in x}
        residual = {name: residual[name] - size * multiplied[name] for name in x}
        before, squared = squared, dot(residual, residual)
        direction = {name: residual[name] + ratio(squared, before) * direction[name] for name in x}
    return x
