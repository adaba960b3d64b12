"""MAML, first-order MAML and ANIL: gradient descent on the support set, differentiated through.

Finn, Abbeel and Levine (2017), "Model-agnostic meta-learning for fast adaptation of deep networks".
Raghu et al. (2020), "Rapid learning or feature reuse? Towards understanding the effectiveness of MAML" (ANIL).
"""

import dataclasses

import torch
from torch import Tensor
from torch.func import grad
from torch.utils import _pytree as pytree

from metalearn.algorithms.base import objective
from metalearn.algorithms.inner_loop import rematerialised
from metalearn.algorithms.linear_head import Adapted, LinearHeadAlgorithm
from metalearn.settings import above, at_least, choice, given_by_run
from metalearn.types import Labelled, Params, State


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAML(LinearHeadAlgorithm):
    """theta_k+1 = theta_k - inner_lr * grad L_support(theta_k); meta-loss L_query(theta_K) (Finn et al. 2017, eq. 1).

    inner_steps, test_inner_steps: K in meta-training and in testing.
    first_order: drop the derivative of the inner gradient (Finn et al. 2017, 5.2).
    adapted_part: "all", or "head" alone (ANIL).
    adapt_normalisation: whether scale and shift of normalisation layers adapt too; the authors' code keeps them fixed.
    inner_loss: "mean" over the support set; "sum" as the authors' code has it: summed over the classes, mean over the
      shots, so N times the mean.
    """

    inner_lr: float = above(0)
    inner_steps: int = at_least(0)
    test_inner_steps: int = at_least(0)
    first_order: bool
    adapted_part: str = choice("all", "head")
    adapt_normalisation: bool
    inner_loss: str = choice("mean", "sum")
    rematerialise: bool = given_by_run(False)

    @property
    def training_steps(self) -> int:
        return self.inner_steps

    def adapts(self, name: str) -> bool:
        """Whether the inner loop changes the weight of this name."""
        if name.startswith("head."):
            return True
        return self.adapted_part == "all" and (self.adapt_normalisation or not name.startswith("net.norm"))

    def adapt(
        self,
        state: State,
        support: Labelled,
        unlabelled: Tensor | None = None,
        *,
        key: Tensor,
        steps: int | None = None,
    ) -> Adapted:
        steps = self.test_inner_steps if steps is None else steps
        fast = {name: value for name, value in state.meta.items() if self.adapts(name)}
        slow = {name: value for name, value in state.meta.items() if name not in fast}
        # With an unchanged backbone the embeddings are the same at every step.
        seen = support
        if self.adapted_part == "head":
            seen = dataclasses.replace(support, x=self.embed(slow, support.x))
        # First order drops d(grad)/d(theta) by never recording it: the inner gradient is taken at a detached point.
        fixed = pytree.tree_map(torch.detach, (slow, seen)) if self.first_order else (slow, seen)
        descend = rematerialised(self.descend) if self.rematerialise and not self.first_order else self.descend
        for _ in range(steps):
            fast = descend(fast, *fixed)
        return self.adapted({name: {**slow, **fast}[name] for name in state.meta}, support.x)

    def descend(self, fast: Params, slow: Params, seen: Labelled) -> Params:
        """One inner step: `fast` after it. seen: the support set, or its embeddings where only the head adapts."""

        def support_loss(fast: Params) -> Tensor:
            params = slow | fast
            z = seen.x if self.adapted_part == "head" else self.embed(params, seen.x)
            value = objective(self.head(params, z), seen.y)
            return value * seen.way if self.inner_loss == "sum" else value

        point = {name: value.detach() for name, value in fast.items()} if self.first_order else fast
        gradient = grad(support_loss)(point)
        return {name: value - self.inner_lr * gradient[name] for name, value in fast.items()}
