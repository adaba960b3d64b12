"""ProtoMAML: MAML with a head that starts from the class means, so it works for any way.

Triantafillou et al. (2020), "Meta-Dataset: A dataset of datasets for learning to learn from few
examples".
"""

import dataclasses
from typing import ClassVar

from torch import Tensor

from metalearn.algorithms.geometry import class_means
from metalearn.algorithms.gradient import GradientAdaptation
from metalearn.tasks.types import Params, Spec, State, Support


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProtoMAML(GradientAdaptation):
    """MAML with a head that starts as ProtoNet and adapts together with the body.

    The head starts at W_n = 2 c_n, b_n = -|c_n|^2 for class means c. Meta-gradients flow through c
    (Triantafillou et al. 2020, 3.2).
    """

    targets: ClassVar[tuple[str, ...]] = ("class",)
    fixed_way: ClassVar[bool] = False
    class_equivariant: ClassVar[bool] = True

    def init(self, spec: Spec, key: Tensor) -> State:
        """Create MAML's state without a head."""
        state = super().init(spec, key)
        params = {
            name: value for name, value in state.params.items() if not name.startswith("head.")
        }
        return State(params, state.buffers)

    def trajectory(self, state: State, support: Support, key: Tensor, steps: int) -> list[Params]:
        """Compute MAML's trajectory from the head given by the class means."""
        c = class_means(
            self.embed(state.params, support.x, self.given(state)), support.y, support.way
        )
        head = {"head.weight": 2 * c, "head.bias": -c.square().sum(-1)}
        return super().trajectory(State(state.params | head, state.buffers), support, key, steps)
