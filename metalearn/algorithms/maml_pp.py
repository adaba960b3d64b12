"""MAML++: MAML with stable training and a learnable inner loop; each change is a setting.

Antoniou, Edwards and Storkey (2019), "How to train your MAML". Their cosine schedule of the
meta-learning rate is `train.schedule=cosine`.
"""

import dataclasses

import torch
from torch import Tensor

from metalearn.algorithms.gradient import GradientAdaptation
from metalearn.algorithms.params import select
from metalearn.config.fields import between
from metalearn.tasks.types import Loss, Params, Spec, State, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAMLPlusPlus(GradientAdaptation):
    """MAML with the meta-loss sum_k w_k L_query(theta_k) and parameters for each inner step.

    Each inner step has its own learning rates and normalisation weights (Antoniou et al. 2019).
    Steps beyond the number in meta-training use the parameters of the last step. `stage` ends both
    fractions of meta-training below.

    `multi_step_share` is the fraction of meta-training in which w moves from 1 / K for each step to
    the last step (4.1; the other steps have at least 0.03 / K, as in their code); `learned_rates`
    learns a rate for each weight tensor and step (LSLR); with `normalisation_per_step`, each step
    has its own scale and shift of each normalisation (BNWB), of which those of earlier steps learn
    only through second derivatives and the losses of their steps. `first_order_share` is the
    fraction without second derivatives (DA); 0 in all their recipes. Departure: no running
    statistics of each step (BNRS), because in the authors' code they never reach an output.
    """

    multi_step_share: float = between(0, 1)
    learned_rates: bool
    normalisation_per_step: bool
    first_order_share: float = between(0, 1)

    def init(self, spec: Spec, key: Tensor) -> State:
        state = super().init(spec, key)
        steps = max(1, self.inner_steps)
        params = dict(state.params)
        if self.normalisation_per_step:
            for name in [name for name in params if name.startswith("net.norm")]:
                params[f"step.{name}"] = params.pop(name).repeat(steps, 1)
        if self.learned_rates:
            initial = [GradientAdaptation.rate(self, {}, "", step) for step in range(steps)]
            params |= {
                f"rate.{name}": torch.tensor(initial, device=key.device)
                for name in list(params)
                if self.adapts(name)
            }
        return State(params, state.buffers)

    @property
    def embeds_once(self) -> bool:  # type: ignore[override]
        """Return True if that of MAML is, and normalisation is the same in each step."""
        return super().embeds_once and not self.normalisation_per_step

    def adapts(self, name: str) -> bool:
        return super().adapts(name.removeprefix("step."))

    def rate(self, slow: Params, name: str, step: int) -> float | Tensor:
        if not self.learned_rates:
            return super().rate(slow, name, step)
        rates = slow[f"rate.{name}"]
        return rates[min(step, len(rates) - 1)]

    def at_step(self, params: Params, step: int) -> Params:
        """Add the normalisation weights of `step` under their plain names."""
        per_step = select(params, "step").items()
        return params | {name: value[min(step, len(value) - 1)] for name, value in per_step}

    def stage(self, progress: float) -> "MAMLPlusPlus":
        return dataclasses.replace(
            self,
            multi_step_share=self.multi_step_share if progress < self.multi_step_share else 0.0,
            first_order=self.first_order or progress < self.first_order_share,
            first_order_share=0.0,
        )

    def loss(self, state: State, task: Task, progress: Tensor) -> Loss:
        trajectory = self.trajectory(state, task.support, task.key, self.inner_steps)
        first = min(1, self.inner_steps) if self.multi_step_share else self.inner_steps
        steps = range(first, self.inner_steps + 1)
        learners = [self.after(trajectory, step, task.support) for step in steps]
        losses = [self.query_loss(state, one, task.query, task.key) for one in learners]
        if len(losses) == 1:
            return losses[0]
        weights = self.step_weights(len(losses), progress)
        value = (weights * torch.stack([loss.value for loss in losses])).sum()
        return Loss(value, losses[-1].logs, losses[-1].statistics)

    def step_weights(self, steps: int, progress: Tensor) -> Tensor:
        """Compute w [K] while the losses of all steps count; the sum is 1."""
        done = (progress / self.multi_step_share).clamp(max=1)
        others = ((1 - done) / steps).clamp(min=0.03 / steps)
        return torch.cat([others.expand(steps - 1), (1 - (steps - 1) * others).reshape(1)])
