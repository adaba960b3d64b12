"""Baseline and Baseline++: frozen features and a new linear or cosine classifier for each task."""

import dataclasses
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor
from torch.func import grad

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.geometry import cosine
from metalearn.config.fields import above, at_least, between, choice
from metalearn.tasks import prng
from metalearn.tasks.types import Params, Spec, State, Support


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline(EmbeddingAlgorithm):
    """A linear or cosine head, fitted to frozen embeddings of the support set.

    logits = W z + b ("linear") or head_scale * cosine(w_n, z) ("cosine", Baseline++). Gradient
    descent with momentum and weight decay fits the head (Chen et al. 2019, 3.2 and 3.3). The linear
    head starts at zero, so it does not depend on the order of the classes. The cosine head starts
    at random. Departures: each step uses all support examples (theirs: batches of 4), and the
    classes of a task have no learned norm.

    In meta-training, cosines have `train_scale`, and each class a learned norm, as in their code.
    """

    sources: ClassVar[tuple[str, ...]] = ("batches",)
    is_iterative: ClassVar[bool] = True
    uses_inner_loss: ClassVar[bool] = True
    takes_gradients: ClassVar[bool] = True

    head: str = choice("linear", "cosine")
    train_scale: float = above(0)
    head_scale: float = above(0)
    head_steps: int = at_least(0)
    head_lr: float = above(0)
    head_momentum: float = between(0, 1)
    head_decay: float = at_least(0)

    @property
    def class_equivariant(self) -> bool:  # type: ignore[override]
        """Return False for the cosine head, which starts at random."""
        return self.head == "linear"

    def init(self, spec: Spec, key: Tensor) -> State:
        """Create the backbone and the training classifier, without a bias for the cosine head."""
        state = super().init(spec, key)
        if self.head == "linear":
            return state
        params = {name: one for name, one in state.params.items() if name != "global.bias"}
        return State(params, state.buffers)

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
            # The standard deviation of torch.nn.Linear's initial weights.
            head = {"weight": prng.normal(key, shape).to(z.dtype) * (3 * shape[1]) ** -0.5}

        def loss(head: Params) -> Tensor:
            return self.supervised.inner_loss(self.compare(weights, head, z), support.y)

        velocity: Params = {}
        for _ in range(self.head_steps):
            gradient = {
                name: value + self.head_decay * head[name]
                for name, value in grad(loss)(head).items()
            }
            # Dampening equals momentum from the second step on, as in their optimiser.
            before, share = velocity or gradient, 1 - self.head_momentum
            velocity = {name: before[name].lerp(gradient[name], share) for name in head}
            head = {name: value - self.head_lr * velocity[name] for name, value in head.items()}
        return head
