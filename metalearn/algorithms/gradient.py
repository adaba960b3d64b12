"""Adaptation by gradient descent on the support set, differentiated through: the base of MAML.

Finn, Abbeel and Levine (2017), "Model-agnostic meta-learning for fast adaptation of deep networks".
Raghu et al. (2020), "Rapid learning or feature reuse? Towards understanding the effectiveness of
MAML" (ANIL).
Oh et al. (2021), "BOIL: Towards representation change for few-shot learning".
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import grad
from torch.utils import _pytree as pytree

from metalearn.algorithms.inner_loop import rematerialised
from metalearn.algorithms.linear_head import Adapted, LinearHeadAlgorithm
from metalearn.config.fields import above, at_least, choice, given_by_run
from metalearn.tasks import prng
from metalearn.tasks.types import Params, State, Support


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientDescent(LinearHeadAlgorithm):
    """Gradient descent on the support set from the meta-trained weights.

    theta_k+1 = theta_k - inner_lr * grad L_support(theta_k) (Finn et al. 2017, eq. 1).
    """

    inner_lr: float = above(0)
    test_inner_steps: int = at_least(0)
    rematerialise: bool = given_by_run(False)

    #: True to drop the derivative of the inner gradient.
    is_first_order: ClassVar[bool] = False
    #: lambda of the term lambda / 2 |theta_k - theta_0|^2 in the inner loss.
    regularisation: ClassVar[float] = 0.0
    #: True if the support set's embeddings are the same at every inner step.
    embeds_once: ClassVar[bool] = False

    def adapts(self, name: str) -> bool:
        """Return True if the inner loop adapts the weight with this name."""
        return True

    def adapt(
        self, state: State, support: Support, *, key: Tensor, steps: int | None = None
    ) -> Adapted:
        steps = self.test_inner_steps if steps is None else steps
        return self.after(self.trajectory(state, support, key, steps), steps, support)

    def trajectory(self, state: State, support: Support, key: Tensor, steps: int) -> list[Params]:
        """Compute all weights before and after each inner step: theta_0 ... theta_K."""
        theta, given = state.params, self.given(state)
        start = {name: value for name, value in theta.items() if self.adapts(name)}
        slow = {name: value for name, value in theta.items() if name not in start}
        if self.embeds_once:
            support = dataclasses.replace(support, x=self.embed(slow, support.x, given))
        fast, trajectory = start, [theta]
        for step in range(steps):
            descend: Callable[..., Params] = functools.partial(self.descend, step)
            if self.rematerialise and not self.is_first_order:
                descend = rematerialised(descend)
            fast = descend(fast, start, slow, support, given, prng.fold_in(key, step))
            trajectory.append({**slow, **fast})
        return trajectory

    def after(self, trajectory: list[Params], steps: int, support: Support) -> Adapted:
        """Return the learner after `steps` steps, with the weights `at_step` of the last one."""
        return self.adapted(self.at_step(trajectory[steps], max(0, steps - 1)), support.x)

    def descend(
        self,
        step: int,
        fast: Params,
        start: Params,
        slow: Params,
        seen: Support,
        given: Params,
        key: Tensor,
    ) -> Params:
        """Compute the weights that adapt, `fast`, after an inner step; `start`: before the first.

        Every tensor must be an argument, because `rematerialised` stores nothing else. `slow` are
        the other weights; with `embeds_once`, the x of the support set holds embeddings.
        """

        def net(params: Params, x: Tensor) -> tuple[Tensor, Params]:
            return self.head(params, x if self.embeds_once else self.embed(params, x, given)), {}

        def support_loss(fast: Params, slow: Params, seen: Support) -> Tensor:
            value = self.family.support_loss(net, self.at_step(slow | fast, step), seen, key)
            return self.inner_objective(value, seen.way)

        # First order drops d(grad)/d(theta): the inner gradient is taken at a detached point.
        point = (fast, slow, seen)
        gradient = grad(support_loss)(
            *(pytree.tree_map(torch.detach, point) if self.is_first_order else point)
        )
        if pull := self.regularisation:
            gradient = {
                name: value + pull * (fast[name] - start[name]) for name, value in gradient.items()
            }
        return {
            name: value - self.rate(slow, name, step) * self.direction(slow, name, gradient[name])
            for name, value in fast.items()
        }

    def inner_objective(self, value: Tensor, way: int) -> Tensor:
        """Return the inner loss [], given the family's loss [] of the support set."""
        return value

    def direction(self, slow: Params, name: str, gradient: Tensor) -> Tensor:
        """Return the direction of an inner step of the weight `name`, shaped like its gradient."""
        return gradient

    def rate(self, slow: Params, name: str, step: int) -> float | Tensor:
        """Return the inner learning rate of the weight `name` in `step`."""
        return self.inner_lr

    def at_step(self, params: Params, step: int) -> Params:
        """Return the weights of the network in `step`, if some weights belong to a single step."""
        return params


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaGradient(GradientDescent):
    """Gradient descent that meta-training differentiates through.

    The last of `step_lrs`, the rates of the first inner steps, is used for all later steps; if they
    are empty, all steps use inner_lr. `first_order` drops the derivative of the inner gradient
    (Finn et al. 2017, 5.2).
    """

    inner_steps: int = at_least(0, in_testing="test_inner_steps")
    step_lrs: list[float] = above(0, default=[])
    first_order: bool

    @property
    def training_steps(self) -> int:  # type: ignore[override]
        """Return `inner_steps`."""
        return self.inner_steps

    @property
    def is_first_order(self) -> bool:  # type: ignore[override]
        """Return `first_order`."""
        return self.first_order

    @property
    def can_rematerialise(self) -> bool:  # type: ignore[override]
        """Return True unless first-order, where no inner step is differentiated."""
        return not self.first_order

    def rate(self, slow: Params, name: str, step: int) -> float | Tensor:
        return self.step_lrs[min(step, len(self.step_lrs) - 1)] if self.step_lrs else self.inner_lr


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientAdaptation(MetaGradient):
    """Gradient descent on the support set, with the meta-loss L_query(theta_K).

    Attributes:
        adapted_part: "all", only the "head" (ANIL), or only the "body" (BOIL).
        pull: lambda of the term lambda / 2 |theta_k - theta_0|^2 in the inner loss; 0 for none. It
            pulls adaptation back to the initialisation (L2-regularised MAML; the regulariser of
            Rajeswaran et al. 2019, eq. 3, differentiated through).
        adapt_normalisation: If true, scale and shift of normalisation layers adapt too. The
            authors' code keeps them fixed.
        inner_loss: "mean" over the support set, or "sum" as in the authors' code: summed over the
            classes and averaged over the shots, so N times the mean.
    """

    adapted_part: str = choice("all", "head", "body")
    pull: float = at_least(0, default=0.0)
    adapt_normalisation: bool
    inner_loss: str = choice("mean", "sum")

    @property
    def regularisation(self) -> float:  # type: ignore[override]
        """Return `pull`."""
        return self.pull

    @property
    def embeds_once(self) -> bool:  # type: ignore[override]
        """Return True if only the head of a predictor adapts."""
        return self.adapted_part == "head" and self.family.predicts

    def adapts(self, name: str) -> bool:
        if name.startswith("head."):
            return self.adapted_part != "body"
        if not name.startswith("net."):
            return False
        return self.adapted_part != "head" and (
            self.adapt_normalisation or not name.startswith("net.norm")
        )

    def inner_objective(self, value: Tensor, way: int) -> Tensor:
        return value * way if self.inner_loss == "sum" else value
