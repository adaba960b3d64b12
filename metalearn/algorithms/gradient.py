"""Adaptation by gradient descent on the support set, differentiated through; MAML's family derives from it.

Finn, Abbeel and Levine (2017), "Model-agnostic meta-learning for fast adaptation of deep networks".
Raghu et al. (2020), "Rapid learning or feature reuse? Towards understanding the effectiveness of MAML" (ANIL).
Oh et al. (2021), "BOIL: Towards representation change for few-shot learning".
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad
from torch.utils import _pytree as pytree

from metalearn.algorithms.inner_loop import rematerialised
from metalearn.algorithms.linear_head import Adapted, LinearHeadAlgorithm
from metalearn.settings import above, at_least, choice, given_by_run
from metalearn.tasks import prng
from metalearn.tasks.types import Params, State, Support


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientAdaptation(LinearHeadAlgorithm):
    """theta_k+1 = theta_k - inner_lr * grad L_support(theta_k); meta-loss L_query(theta_K) (Finn et al. 2017, eq. 1).

    inner_steps, test_inner_steps: K in meta-training and in testing.
    step_lrs: rates of the first inner steps, the last one for all further ones; empty: inner_lr for each.
    first_order: drop the derivative of the inner gradient (Finn et al. 2017, 5.2).
    adapted_part: "all", the "head" alone (ANIL), or the "body" alone (BOIL).
    pull: lambda of a term lambda / 2 |theta_k - theta_0|^2 in the inner loss, which pulls adaptation back to the initialisation
      (L2-regularised MAML; the regulariser of Rajeswaran et al. 2019, eq. 3, differentiated through); 0: none.
    adapt_normalisation: whether scale and shift of normalisation layers adapt too; the authors' code keeps them fixed.
    inner_loss: "mean" over the support set; "sum" as the authors' code has it: summed over the classes, mean over the
      shots, so N times the mean.
    """

    inner_lr: float = above(0)
    inner_steps: int = at_least(0, in_testing="test_inner_steps")
    test_inner_steps: int = at_least(0)
    first_order: bool
    adapted_part: str = choice("all", "head", "body")
    pull: float = at_least(0, default=0.0)
    adapt_normalisation: bool
    inner_loss: str = choice("mean", "sum")
    step_lrs: list[float] = above(0, default=[])
    rematerialise: bool = given_by_run(False)

    @property
    def training_steps(self) -> int:
        return self.inner_steps

    @property
    def can_rematerialise(self) -> bool:
        return not self.first_order

    @property
    def embeds_once(self) -> bool:
        """Whether embeddings of the support set are the same at every step, as with an unchanged backbone."""
        return self.adapted_part == "head" and self.family.predicts

    def adapts(self, name: str) -> bool:
        """Whether the inner loop changes the weight of this name."""
        if name.startswith("head."):
            return self.adapted_part != "body"
        if not name.startswith("net."):
            return False
        return self.adapted_part != "head" and (
            self.adapt_normalisation or not name.startswith("net.norm")
        )

    def adapt(
        self, state: State, support: Support, *, key: Tensor, steps: int | None = None
    ) -> Adapted:
        steps = self.test_inner_steps if steps is None else steps
        return self.after(self.trajectory(state, support, key, steps), steps, support)

    def trajectory(self, state: State, support: Support, key: Tensor, steps: int) -> list[Params]:
        """Return all weights before and after each of the inner steps: theta_0 ... theta_K."""
        theta, given = state.params, self.given(state)
        start = {name: value for name, value in theta.items() if self.adapts(name)}
        slow = {name: value for name, value in theta.items() if name not in start}
        seen = (
            dataclasses.replace(support, x=self.embed(slow, support.x, given))
            if self.embeds_once
            else support
        )
        fast, found = start, [theta]
        for step in range(steps):
            descend: Callable[..., Params] = functools.partial(self.descend, step)
            if self.rematerialise and not self.first_order:
                descend = rematerialised(descend)
            fast = descend(fast, start, slow, seen, given, prng.fold_in(key, step))
            found.append({**slow, **fast})
        return found

    def after(self, trajectory: list[Params], steps: int, support: Support) -> Adapted:
        """The learner after so many of the steps; its network is that of the last of them."""
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
        """Return `fast` after one inner step. Every tensor is an argument, because `rematerialised` keeps nothing else.

        Args:
            step: number of the inner step, from 0.
            fast: the weights that adapt.
            start: what `fast` was before the first step.
            slow: the weights that do not adapt.
            seen: the support set, its x replaced by embeddings where these are the same at every step.
            given: see `embed`.
            key: int64 [], of this step.
        """

        def net(params: Params, x: Tensor) -> tuple[Tensor, Params]:
            return self.head(params, x if self.embeds_once else self.embed(params, x, given)), {}

        def support_loss(fast: Params, slow: Params, seen: Support) -> Tensor:
            value = self.family.support_loss(net, self.at_step(slow | fast, step), seen, key)
            return value * seen.way if self.inner_loss == "sum" else value

        # First order drops d(grad)/d(theta) by never recording it: the inner gradient is taken at a detached point.
        point = (fast, slow, seen)
        gradient = grad(support_loss)(
            *(pytree.tree_map(torch.detach, point) if self.first_order else point)
        )
        if self.pull:
            gradient = {
                name: value + self.pull * (fast[name] - start[name])
                for name, value in gradient.items()
            }
        return {
            name: value - self.rate(slow, name, step) * gradient[name]
            for name, value in fast.items()
        }

    def rate(self, slow: Params, name: str, step: int) -> float | Tensor:
        """Return the inner learning rate of a weight in a step."""
        return self.step_lrs[min(step, len(self.step_lrs) - 1)] if self.step_lrs else self.inner_lr

    def at_step(self, params: Params, step: int) -> Params:
        """The weights that the network has in a step, where some belong to one step alone."""
        return params
