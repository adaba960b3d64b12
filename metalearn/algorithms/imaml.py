"""iMAML: the implicit meta-gradient of a regularised inner problem, for any inner solver.

Rajeswaran, Finn, Kakade and Levine (2019), "Meta-learning with implicit gradients".
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad

from metalearn.algorithms.gradient import GradientDescent
from metalearn.algorithms.params import dot
from metalearn.config.fields import above, at_least
from metalearn.tasks import prng
from metalearn.tasks.types import Loss, Params, State, Support, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class IMAML(GradientDescent):
    """Meta-gradient of a regularised inner problem by the implicit function theorem.

    phi = argmin L_support(phi) + lambda / 2 |phi - theta|^2. The meta-gradient is
    (I + H / lambda)^-1 grad L_query(phi), with H the Hessian of L_support at phi (Rajeswaran et al.
    2019, eq. 3 and 6). All weights adapt, including those of normalisation.

    Attributes:
        inner_steps: Gradient steps towards phi in meta-training.
        strength: lambda.
        cg_steps: Number of conjugate gradient steps, fixed.
        damping: Added to 1 in the matrix, as in the authors' code: at a phi that is only near the
            minimum, H may not be positive.
        strength_damping: Added to lambda in the matrix, for the same reason.
    """

    inner_steps: int = at_least(0, in_testing="test_inner_steps")
    strength: float = above(0)
    cg_steps: int = at_least(0)
    damping: float = at_least(0)
    strength_damping: float = at_least(0)

    @property
    def training_steps(self) -> int:
        return self.inner_steps

    @property
    def regularisation(self) -> float:
        return self.strength

    def solve(self, state: State, support: Support, key: Tensor, steps: int) -> Params:
        """Approximate phi by gradient descent from theta."""
        return self.trajectory(state, support, key, steps)[-1]

    def loss(self, state: State, task: Task, progress: Tensor) -> Loss:
        """Compute a surrogate whose gradient in theta is the implicit meta-gradient.

        The logs hold the query loss of phi.
        """
        theta = {name: value.detach() for name, value in state.params.items()}
        start, given = State(theta, state.buffers), self.given(state)
        phi = self.solve(start, task.support, task.key, self.inner_steps)
        last = prng.fold_in(task.key, self.inner_steps)

        def query_loss(phi: Params) -> tuple[Tensor, Loss]:
            loss = self.query_loss(start, self.adapted(phi, task.support.x), task.query, task.key)
            return loss.value, loss

        gradient, held_out = grad(query_loss, has_aux=True)(phi)

        def product(v: Params) -> Params:
            """Compute (I + H / lambda) v with both dampings."""

            def slope(phi: Params) -> Tensor:
                return dot(grad(self.support_loss)(phi, task.support, given, last), v)

            hessian_v = grad(slope)(phi)
            curvature = self.strength + self.strength_damping
            return {name: (1 + self.damping) * v[name] + hessian_v[name] / curvature for name in v}

        direction = conjugate_gradients(product, gradient, self.cg_steps)
        value = dot(state.params, {name: one.detach() for name, one in direction.items()})
        return Loss(value, held_out.logs, held_out.statistics)


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
