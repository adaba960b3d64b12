"""What the transfer baselines share: ordinary training over all training classes, and a new head for each task.

Chen et al. (2019), "A closer look at few-shot classification".
"""

import dataclasses
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn import random
from metalearn.algorithms.base import Algorithm, objective, prefixed, select
from metalearn.algorithms.embedding import Learned
from metalearn.types import Labelled, Loss, Params, Spec, State, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferAlgorithm(Algorithm):
    """Meta-training is cross-entropy over all training classes on ordinary batches (`train.source=batches`). A method writes
    `learn`, a head from frozen embeddings of the support set, and `compare`.
    """

    sources: ClassVar[tuple[str, ...]] = ("batches",)

    @property
    def adapts_in_steps(self) -> bool:
        return True

    def learn(self, z: Tensor, support: Labelled, key: Tensor) -> Any:
        """Any pytree, from embeddings z [M, D] and the labels of the support set."""
        raise NotImplementedError

    def compare(self, learned: Any, z: Tensor) -> Tensor:
        """Logits [Q, N] of queries with embeddings z [Q, D]."""
        raise NotImplementedError

    def trained_logits(self, meta: Params, z: Tensor) -> Tensor:
        """Logits [B, C] over all training classes."""
        return F.linear(z, meta["global.weight"], meta["global.bias"])

    def init(self, spec: Spec, key: Tensor) -> State:
        net, population = self.backbone.init(spec.input_shape, random.fold_in(key, 0))
        outputs, size = spec.train_classes or spec.way, math.prod(self.backbone.shape(spec.input_shape))
        head = {
            "global.weight": random.normal(random.fold_in(key, 1), (outputs, size)) * size**-0.5,
            "global.bias": torch.zeros(outputs, device=key.device),
        }
        return State(prefixed(net, "net") | head, prefixed(population, "net"))

    def adapt(
        self,
        state: State,
        support: Labelled,
        unlabelled: Tensor | None = None,
        *,
        key: Tensor,
        steps: int | None = None,
    ) -> Learned:
        z, reference = self.embed_support(state, support.x)
        return Learned(self.learn(z.detach(), support, key), reference)

    def forward(self, state: State, learner: Learned, x: Tensor, key: Tensor | None) -> tuple[Tensor, Params]:
        z, seen = self.embed_queries(state, select(state.meta, "net"), learner.reference, x, key)
        return self.compare(learner.head, z), seen

    def loss(self, state: State, task: Task, progress: Tensor) -> Loss:
        z, seen = self.embed_training(state, select(state.meta, "net"), task.query.x, task.key)
        prediction = self.trained_logits(state.meta, z)
        return self.scored(objective(prediction, task.query.y), prediction, task.query.y, seen)
