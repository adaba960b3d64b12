"""Meta-SGD: MAML with a learned inner learning rate for every single weight."""

import dataclasses

from torch import Tensor

from metalearn.algorithms.gradient import GradientAdaptation
from metalearn.config.fields import above
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.types import Params, Spec, State


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaSGD(GradientAdaptation):
    """MAML with a meta-learned rate alpha for every weight.

    theta_k+1 = theta_k - alpha * grad L_support(theta_k), alpha of theta's shape (Li et al. 2017,
    eq. 2). alpha starts uniform between inner_lr and inner_lr_max. A rate may become negative, as
    in the paper.
    """

    inner_lr_max: float = above(0)

    def __post_init__(self) -> None:
        if self.step_lrs:
            raise UserError(
                f"algo.step_lrs={list(self.step_lrs)}: MetaSGD learns its rates; leave it empty"
            )

    def init(self, spec: Spec, key: Tensor) -> State:
        state = super().init(spec, key)
        width = self.inner_lr_max - self.inner_lr
        rates = {
            f"rate.{name}": self.inner_lr
            + width * prng.uniform(prng.fold_in(key, 100 + number), value.shape)
            for number, (name, value) in enumerate(state.params.items())
            if self.adapts(name)
        }
        return State(state.params | rates, state.buffers)

    def rate(self, slow: Params, name: str, step: int) -> Tensor:
        return slow[f"rate.{name}"]
