"""Full fine-tuning of a network trained on all classes, or on all tasks together."""

import dataclasses
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor
from torch.func import grad

from metalearn.algorithms.base import objective, prefixed, select
from metalearn.algorithms.linear_head import Adapted
from metalearn.algorithms.transfer import TransferAlgorithm
from metalearn.settings import above, at_least
from metalearn.types import Labelled, Params, State


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuning(TransferAlgorithm):
    """theta_k+1 = theta_k - inner_lr * grad L_support(theta_k) for all weights, from the trained ones; for classes the head is new
    and starts at zero (the fine-tuning baseline of Finn et al. 2017, 5.1 to 5.2).

    test_inner_steps, inner_lr: of gradient descent on the whole support set, normalised by the population's statistics where
      queries are, else by its own.
    """

    targets: ClassVar[tuple[str, ...]] = ("class", "value")

    inner_lr: float = above(0)
    test_inner_steps: int = at_least(0)

    def adapt(  # type: ignore[override]
        self,
        state: State,
        support: Labelled,
        unlabelled: Tensor | None = None,
        *,
        key: Tensor,
        steps: int | None = None,
    ) -> Adapted:
        params = {name: value for name, value in state.meta.items() if name.startswith("net.")}
        trained = prefixed(select(state.meta, "global"), "head")
        if not support.y.is_floating_point():
            shape = (support.way, trained["head.weight"].shape[-1])
            trained = {"head.weight": support.x.new_zeros(shape), "head.bias": support.x.new_zeros(support.way)}
        params |= trained
        given = select(state.fixed, "net") if self.statistics == "population" else None

        def loss(params: Params) -> Tensor:
            z = self.backbone.embed(select(params, "net"), support.x, given)[0]
            return objective(F.linear(z, params["head.weight"], params["head.bias"]), support.y)

        for _ in range(self.test_inner_steps if steps is None else steps):
            gradient = grad(loss)(params)
            params = {name: value - self.inner_lr * gradient[name] for name, value in params.items()}
        return Adapted(params, self.reference(select(params, "net"), support.x))

    def forward(self, state: State, learner: Adapted, x: Tensor, key: Tensor | None) -> tuple[Tensor, Params]:  # type: ignore[override]
        z, seen = self.embed_queries(state, select(learner.params, "net"), learner.reference, x, key)
        return F.linear(z, learner.params["head.weight"], learner.params["head.bias"]), seen
