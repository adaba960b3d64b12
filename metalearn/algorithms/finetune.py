"""Full fine-tuning of a network trained on all classes, or on all tasks together."""

import dataclasses
import math
from typing import ClassVar

from torch import Tensor

from metalearn.algorithms.batches import BatchTraining
from metalearn.algorithms.gradient import GradientDescent
from metalearn.algorithms.params import prefixed, select
from metalearn.tasks import prng
from metalearn.tasks.types import Params, Spec, State, Support


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuning(BatchTraining, GradientDescent):
    """Gradient descent of all trained weights on the full support set.

    theta_k+1 = theta_k - inner_lr * grad L_support(theta_k), the fine-tuning baseline of Finn et
    al. (2017), 5.1 to 5.2. For classes, the head is new and starts at zero. The support set is
    normalised by population statistics if queries are, else by its own statistics.
    """

    targets: ClassVar[tuple[str, ...]] = ("class", "value")
    fixed_way: ClassVar[bool] = False
    class_equivariant: ClassVar[bool] = True

    def init(self, spec: Spec, key: Tensor) -> State:
        net, population = self.backbone.init(spec.inputs, prng.fold_in(key, 0))
        size = math.prod(self.backbone.shape(spec.inputs))
        params = prefixed(net, "net") | self.init_classifier(spec, size, prng.fold_in(key, 1))
        return State(params, prefixed(population, "net"))

    def given(self, state: State) -> Params:
        """Return the statistics that normalise a support set at prediction; {} for its own."""
        return self.normalisation.for_support(state) or {}

    def trajectory(self, state: State, support: Support, key: Tensor, steps: int) -> list[Params]:
        params = {name: value for name, value in state.params.items() if name.startswith("net.")}
        head = prefixed(select(state.params, "global"), "head")
        if self.family.target == "class":
            way, size = support.way, head["head.weight"].shape[-1]
            x = support.x
            head = {"head.weight": x.new_zeros(way, size), "head.bias": x.new_zeros(way)}
        return super().trajectory(State(params | head, state.buffers), support, key, steps)
