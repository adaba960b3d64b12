"""ProtoMAML: MAML whose head starts from the class means, so that any number of ways can be asked.

Triantafillou et al. (2020), "Meta-Dataset: A dataset of datasets for learning to learn from few examples".
"""

import dataclasses
from typing import ClassVar

from torch import Tensor

from metalearn.algorithms.geometry import class_means
from metalearn.algorithms.gradient import GradientAdaptation
from metalearn.tasks.types import Params, Spec, State, Support


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProtoMAML(GradientAdaptation):
    """The head starts at W_n = 2 c_n, b_n = -|c_n|^2 for class means c, which is ProtoNet, and adapts from there with the
    body; meta-gradients flow through c (Triantafillou et al. 2020, 3.2).
    """

    targets: ClassVar[tuple[str, ...]] = ("class",)
    fixed_way: ClassVar[bool] = False
    class_equivariant: ClassVar[bool] = True

    def init(self, spec: Spec, key: Tensor) -> State:
        state = super().init(spec, key)
        params = {
            name: value for name, value in state.params.items() if not name.startswith("head.")
        }
        return State(params, state.buffers)

    def trajectory(self, state: State, support: Support, key: Tensor, steps: int) -> list[Params]:
        c = class_means(
            self.embed(state.params, support.x, self.given(state)), support.y, support.way
        )
        head = {"head.weight": 2 * c, "head.bias": -c.square().sum(-1)}
        return super().trajectory(State(state.params | head, state.buffers), support, key, steps)
