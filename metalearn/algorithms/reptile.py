"""Reptile: move the initialisation towards the weights after training on each task."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import grad

from metalearn.algorithms.linear_head import Adapted, LinearHeadAlgorithm
from metalearn.algorithms.params import dot, prefixed, select
from metalearn.config.fields import above, at_least, between
from metalearn.tasks import prng
from metalearn.tasks.types import Loss, Params, Spec, State, Support, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reptile(LinearHeadAlgorithm):
    """Adam steps on mini-batches of the support set, with the meta-gradient theta - phi.

    phi is the result of the Adam steps from theta (Nichol et al. 2018, alg. 2). The inner optimiser
    is Adam without momentum (beta1 = 0). As in the authors' code, its second moment is carried from
    task to task, also in testing. After a reset, the first step of each task would have the same
    size for small and large gradients. The moment and its total weight are buffers, averaged over
    the tasks of each meta-step. Departure: all tasks of a meta-step start from the same moment.

    Mini-batches are sampled without replacement in each epoch.
    """

    support_order_matters: ClassVar[bool] = True  # mini-batches are sampled by index
    uses_loss: ClassVar[bool] = False  # the query loss is only logged
    accepts_soft_labels: ClassVar[bool] = False

    inner_lr: float = above(0)
    inner_steps: int = at_least(0, in_testing="test_inner_steps")
    test_inner_steps: int = at_least(0)
    inner_batch: int = at_least(1, in_testing="test_inner_batch")
    test_inner_batch: int = at_least(1)
    inner_beta2: float = between(0, 1)
    inner_eps: float = above(0)

    @property
    def training_steps(self) -> int:  # type: ignore[override]
        """Return `inner_steps`."""
        return self.inner_steps

    def init(self, spec: Spec, key: Tensor) -> State:
        """Create the weights, and Adam's second moment as zero buffers."""
        state = super().init(spec, key)
        zeros = {name: torch.zeros_like(value) for name, value in state.params.items()}
        own = {**prefixed(zeros, "moment"), "moment_weight": torch.zeros((), device=key.device)}
        return State(state.params, state.buffers | own)

    def _train(
        self, start: State, support: Support, key: Tensor, steps: int, batch: int
    ) -> tuple[Params, Params]:
        """Train on the support set; return the weights and the moments after the last step."""
        given = self.given(start)
        size = support.x.shape[0]
        epochs = -(-steps * batch // size)
        orders = [prng.permutation(prng.fold_in(key, epoch), size) for epoch in range(epochs)]
        order = torch.cat(orders or [key[None]])

        def batch_loss(params: Params, indices: Tensor, key: Tensor) -> Tensor:
            batch = dataclasses.replace(support, x=support.x[indices], y=support.y[indices])
            return self.support_loss(params, batch, given, key)

        phi, moment = start.params, select(start.buffers, "moment")
        weight = start.buffers["moment_weight"]
        for step in range(steps):
            indices = order[step * batch : (step + 1) * batch]
            gradient = grad(batch_loss)(phi, indices, prng.fold_in(key, epochs + step))
            moment = {
                name: moment[name].lerp(gradient[name].square(), 1 - self.inner_beta2)
                for name in phi
            }
            # 1 - beta2^t: Adam's bias correction.
            weight = self.inner_beta2 * weight + (1 - self.inner_beta2)
            phi = {
                name: phi[name]
                - self.inner_lr * gradient[name] / ((moment[name] / weight).sqrt() + self.inner_eps)
                for name in phi
            }
        return phi, prefixed(moment, "moment") | {"moment_weight": weight}

    def adapt(
        self, state: State, support: Support, *, key: Tensor, steps: int | None = None
    ) -> Adapted:
        steps = self.test_inner_steps if steps is None else steps
        phi, _ = self._train(state, support, key, steps, self.test_inner_batch)
        return self.adapted(phi, support.x)

    def loss(self, state: State, task: Task, progress: Tensor) -> Loss:
        """Compute a surrogate whose gradient in theta is theta - phi.

        The logs hold the query loss of phi.
        """
        theta = {name: value.detach() for name, value in state.params.items()}
        start = State(theta, state.buffers)
        steps, batch = self.inner_steps, self.inner_batch
        phi, moments = self._train(start, task.support, task.key, steps, batch)
        value = dot(state.params, {name: theta[name] - phi[name] for name in theta})
        held_out = self.query_loss(start, self.adapted(phi, task.support.x), task.query, task.key)
        return Loss(value, held_out.logs, held_out.statistics, buffers=moments)
