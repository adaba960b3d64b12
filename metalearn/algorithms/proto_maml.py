"""ProtoMAML: MAML with a head that starts from the class means, so it works for any way."""

import dataclasses
from typing import ClassVar

from torch import Tensor

from metalearn.algorithms.geometry import class_means
from metalearn.algorithms.gradient import GradientAdaptation
from metalearn.algorithms.protonet import distance_scale
from metalearn.config.fields import above
from metalearn.tasks.types import Params, Spec, State, Support


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProtoMAML(GradientAdaptation):
    """MAML with a head that starts as ProtoNet and adapts together with the body.

    The head starts at W_n = 2 c_n, b_n = -|c_n|^2 for class means c. Meta-gradients flow through c
    (Triantafillou et al. 2020, 3.2).

    The temperature divides squared distances: the head sees z / sqrt(temperature).
    """

    targets: ClassVar[tuple[str, ...]] = ("class",)
    fixed_way: ClassVar[bool] = False
    class_equivariant: ClassVar[bool] = True

    temperature: float | None = above(0, default=1.0)

    def init(self, spec: Spec, key: Tensor) -> State:
        state = super().init(spec, key)
        params = {
            name: value for name, value in state.params.items() if not name.startswith("head.")
        }
        return State(params, state.buffers)

    def head(self, params: Params, z: Tensor) -> Tensor:
        return super().head(params, self.scaled(z))

    def scaled(self, z: Tensor) -> Tensor:
        """Divide embeddings by the root of the temperature."""
        return z * (self.temperature or distance_scale(z)) ** -0.5

    def trajectory(self, state: State, support: Support, key: Tensor, steps: int) -> list[Params]:
        z = self.embed(state.params, support.x, self.given(state))
        c = class_means(self.scaled(z), support.y, support.way)
        head = {"head.weight": 2 * c, "head.bias": -c.square().sum(-1)}
        return super().trajectory(State(state.params | head, state.buffers), support, key, steps)
