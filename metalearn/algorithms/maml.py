"""MAML, first-order MAML and ANIL: gradient descent on the support set, differentiated through.

Finn, Abbeel and Levine (2017), "Model-agnostic meta-learning for fast adaptation of deep networks".
Raghu et al. (2020), "Rapid learning or feature reuse? Towards understanding the effectiveness of MAML" (ANIL).
"""

import dataclasses

from torch import Tensor
from torch.func import grad

from metalearn.algorithms.base import objective
from metalearn.algorithms.linear_head import Adapted, LinearHeadAlgorithm
from metalearn.settings import above, at_least, choice
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
        z_support = self.embed(slow, support.x) if self.adapted_part == "head" else None

        def support_loss(fast: Params) -> Tensor:
            params = slow | fast
            z = self.embed(params, support.x) if z_support is None else z_support
            value = objective(self.head(params, z), support.y)
            return value * support.way if self.inner_loss == "sum" else value

        if self.first_order:
            # d(grad)/d(theta) is dropped by never recording it: the inner gradient is taken at a detached point.
            slow = {name: value.detach() for name, value in slow.items()}
            z_support = None if z_support is None else z_support.detach()
        for _ in range(steps):
            point = {name: value.detach() for name, value in fast.items()} if self.first_order else fast
            gradient = grad(support_loss)(point)
            fast = {name: value - self.inner_lr * gradient[name] for name, value in fast.items()}
        slow = {name: state.meta[name] for name in slow}
        return self.adapted({name: {**slow, **fast}[name] for name in state.meta}, support.x)
