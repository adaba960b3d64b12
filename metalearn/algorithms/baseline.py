"""Baseline and Baseline++: frozen features with a new linear, or cosine, classifier for each task.

Chen et al. (2019), "A closer look at few-shot classification".
"""

import dataclasses
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor
from torch.func import grad

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.geometry import cosine
from metalearn.settings import above, at_least, between, choice
from metalearn.tasks import prng
from metalearn.tasks.types import Params, Spec, State, Support


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline(EmbeddingAlgorithm):
    """logits = W z + b ("linear"), or head_scale * cosine(w_n, z) ("cosine", Baseline++), fitted on the frozen support set by
    gradient descent with momentum and weight decay (Chen et al. 2019, 3.2 and 3.3).

    train_scale: of the cosines in meta-training, where each class has a learned norm besides, as in the authors' code.
    Departures: every step sees the whole support set (theirs: batches of 4), and classes of a task have no norm of their own.
    The linear head starts at zero, so that it does not depend on the order of the classes; the cosine one at random.
    """

    sources: ClassVar[tuple[str, ...]] = ("batches",)
    is_iterative: ClassVar[bool] = True
    uses_inner_loss: ClassVar[bool] = True

    head: str = choice("linear", "cosine")
    train_scale: float = above(0)
    head_scale: float = above(0)
    head_steps: int = at_least(0)
    head_lr: float = above(0)
    head_momentum: float = between(0, 1)
    head_decay: float = at_least(0)

    @property
    def class_equivariant(self) -> bool:  # type: ignore[override]
        return self.head == "linear"

    def init(self, spec: Spec, key: Tensor) -> State:
        state = super().init(spec, key)
        if self.head == "linear":
            return state
        return State(
            {name: value for name, value in state.params.items() if name != "global.bias"},
            state.buffers,
        )

    def classify(self, params: Params, z: Tensor) -> Tensor:
        if self.head == "linear":
            return super().classify(params, z)
        return self.train_scale * F.linear(F.normalize(z, dim=-1), params["global.weight"])

    def compare(self, weights: Params, learned: Params, z: Tensor) -> Tensor:
        if self.head == "linear":
            return F.linear(z, learned["weight"], learned["bias"])
        return self.head_scale * cosine(z, learned["weight"])

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Params:
        z = z.detach()
        shape = (support.way, z.shape[-1])
        if self.head == "linear":
            head = {"weight": z.new_zeros(shape), "bias": z.new_zeros(support.way)}
        else:
            head = {
                "weight": prng.normal(key, shape).to(z.dtype) * (3 * shape[1]) ** -0.5
            }  # as wide as torch's linear layer starts

        def loss(head: Params) -> Tensor:
            return self.supervised.inner_loss(self.compare(weights, head, z), support.y)

        speed: Params = {}
        for _ in range(self.head_steps):
            gradient = {
                name: value + self.head_decay * head[name]
                for name, value in grad(loss)(head).items()
            }
            # Momentum with as much dampening, from the second step on, as their optimiser has it.
            speed = (
                {name: speed[name].lerp(gradient[name], 1 - self.head_momentum) for name in head}
                if speed
                else gradient
            )
            head = {name: value - self.head_lr * speed[name] for name, value in head.items()}
        return head
