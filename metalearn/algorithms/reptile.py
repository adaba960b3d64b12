"""Reptile: move the initialisation towards the weights that training on a task leads to.

Nichol, Achiam and Schulman (2018), "On first-order meta-learning algorithms".
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import grad

from metalearn import random
from metalearn.algorithms.base import objective, prefixed, select
from metalearn.algorithms.linear_head import Adapted, LinearHeadAlgorithm
from metalearn.settings import above, at_least, between, given_by_run
from metalearn.types import Labelled, Loss, Params, Spec, State, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reptile(LinearHeadAlgorithm):
    """phi = Adam steps on mini-batches of the support set from theta; meta-gradient theta - phi (Nichol et al. 2018, alg. 2).

    The inner optimiser is Adam without momentum (beta1 = 0). As in the authors' code its second moment is carried from
    task to task, in testing too: started anew it would make the first step of each task as long for a small gradient
    as for a large one. It stands in `fixed`, with the weight it has gathered, and becomes the mean over the tasks of
    each step. Departure: tasks of one step start from the same moment.
    inner_batch, test_inner_batch: examples of a mini-batch, drawn without replacement, epoch after epoch.
    """

    support_order_matters: ClassVar[bool] = True  # mini-batches are drawn by position

    inner_lr: float = above(0)
    inner_steps: int = at_least(0)
    test_inner_steps: int = at_least(0)
    inner_batch: int = at_least(1)
    test_inner_batch: int = at_least(1)
    inner_beta2: float = between(0, 1)
    inner_eps: float = above(0)
    statistics_momentum: float = given_by_run()

    @property
    def training_steps(self) -> int:
        return self.inner_steps

    def init(self, spec: Spec, key: Tensor) -> State:
        state = super().init(spec, key)
        moment = prefixed({name: torch.zeros_like(value) for name, value in state.meta.items()}, "moment")
        return State(state.meta, state.fixed | moment | {"moment_weight": torch.zeros((), device=key.device)})

    def _descend(self, start: State, support: Labelled, key: Tensor, steps: int, batch: int) -> tuple[Params, Params]:
        """The weights that training from theta leads to, and the moments as they are then."""
        given = self.own_statistics(start)
        size = support.x.shape[0]
        epochs = -(-steps * batch // size)
        order = torch.cat(
            [random.permutation(random.fold_in(key, epoch), size) for epoch in range(epochs)] or [key[None]]
        )

        def batch_loss(params: Params, chosen: Tensor) -> Tensor:
            return objective(self.head(params, self.embed(params, support.x[chosen], given)), support.y[chosen])

        phi, moment, weight = start.meta, select(start.fixed, "moment"), start.fixed["moment_weight"]
        for step in range(steps):
            gradient = grad(batch_loss)(phi, order[step * batch : (step + 1) * batch])
            moment = {name: moment[name].lerp(gradient[name].square(), 1 - self.inner_beta2) for name in phi}
            weight = self.inner_beta2 * weight + (1 - self.inner_beta2)  # 1 - beta2^t: Adam's correction
            phi = {
                name: phi[name] - self.inner_lr * gradient[name] / ((moment[name] / weight).sqrt() + self.inner_eps)
                for name in phi
            }
        return phi, prefixed(moment, "moment") | {"moment_weight": weight}

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
        phi, _ = self._descend(state, support, key, steps, self.test_inner_batch)
        return self.adapted(phi, support.x)

    def loss(self, state: State, task: Task, progress: Tensor) -> Loss:
        """A surrogate whose gradient in theta is theta - phi; the query loss of phi is among the logs."""
        theta = {name: value.detach() for name, value in state.meta.items()}
        start = State(theta, state.fixed)
        phi, moments = self._descend(start, task.support, task.key, self.inner_steps, self.inner_batch)
        direction = {name: theta[name] - phi[name] for name in theta}
        value = torch.stack([(state.meta[name] * direction[name]).sum() for name in theta]).sum()
        held_out = self.query_loss(start, self.adapted(phi, task.support.x), task.query, task.key)
        # The loop moves `fixed` by a share of the way to what it is given; this is as far off as takes it all the way.
        share = self.statistics_momentum or 1.0
        seen = {name: state.fixed[name] + (value - state.fixed[name]) / share for name, value in moments.items()}
        return Loss(value, held_out.logs, held_out.statistics | seen)
