"""iMAML: the implicit meta-gradient of a regularised inner problem, for any inner solver."""

import dataclasses

from torch import Tensor
from torch.func import grad

from metalearn.algorithms.gradient import GradientDescent
from metalearn.algorithms.params import dot
from metalearn.algorithms.solvers import conjugate_gradients
from metalearn.config.fields import above, at_least
from metalearn.tasks import prng
from metalearn.tasks.types import Loss, Params, State, Support, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class IMAML(GradientDescent):
    """Meta-gradient of a regularised inner problem by the implicit function theorem.

    phi = argmin L_support(phi) + lambda / 2 |phi - theta|^2. The meta-gradient is
    (I + H / lambda)^-1 grad L_query(phi), with H the Hessian of L_support at phi (Rajeswaran et al.
    2019, eq. 3 and 6). All weights adapt, including those of normalisation.

    `damping` is added to 1 and `strength_damping` to lambda (`strength`) in the matrix, as in the
    authors' code: at a phi that is only near the minimum, H may not be positive.
    """

    inner_steps: int = at_least(0, in_testing="test_inner_steps")
    strength: float = above(0)
    cg_steps: int = at_least(0)
    damping: float = at_least(0)
    strength_damping: float = at_least(0)

    @property
    def training_steps(self) -> int:  # type: ignore[override]
        """Return `inner_steps`."""
        return self.inner_steps

    @property
    def regularisation(self) -> float:  # type: ignore[override]
        """Return lambda."""
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
