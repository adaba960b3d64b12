"""Methods that learn from the embeddings of the support set and compare those of queries with what they learned."""

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalearn import random
from metalearn.algorithms.base import Algorithm, objective, prefixed, select
from metalearn.types import Labelled, Loss, Params, Spec, State, Task


class Examples(NamedTuple):
    """The support set: embeddings [M, D], and its labels [M, N] as ones and zeros."""

    z: Tensor
    y: Tensor


class Learned(NamedTuple):
    """A learner: what `learn` returned, and what the normalisation at prediction needs."""

    head: Any
    reference: Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingAlgorithm(Algorithm):
    """A method writes `learn` and `compare`, `init_head` where it has weights besides the backbone's, and `judged` where its
    objective is not the cross-entropy of its predictions. What they get as `meta` holds the state's `fixed` too.

    Under `statistics=population`, support and query are embedded in one batch while training, as ProtoNet's authors do.
    """

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        """Meta-parameters besides the backbone's. size: D."""
        return {}

    def learn(self, meta: Params, z: Tensor, support: Labelled) -> Any:
        """Any pytree, from embeddings z [M, D] of the support set and its labels."""
        raise NotImplementedError

    def compare(self, meta: Params, learned: Any, z: Tensor) -> Tensor:
        """Logits [Q, N] of queries with embeddings z [Q, D]."""
        raise NotImplementedError

    def judged(self, meta: Params, learned: Any, z: Tensor, query: Labelled, statistics: Params) -> Loss:
        """The objective for queries with embeddings z [Q, D]."""
        prediction = self.compare(meta, learned, z)
        return self.scored(objective(prediction, query.y), prediction, query.y, statistics)

    def init(self, spec: Spec, key: Tensor) -> State:
        net, population = self.backbone.init(spec.input_shape, random.fold_in(key, 0))
        head = self.init_head(spec, math.prod(self.backbone.shape(spec.input_shape)), random.fold_in(key, 1))
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
        return Learned(self.learn(state.meta | state.fixed, z, support), reference)

    def forward(self, state: State, learner: Learned, x: Tensor, key: Tensor | None) -> tuple[Tensor, Params]:
        z, seen = self.embed_queries(state, select(state.meta, "net"), learner.reference, x, key)
        return self.compare(state.meta | state.fixed, learner.head, z), seen

    def loss(self, state: State, task: Task, progress: Tensor) -> Loss:
        support, query, net, weights = task.support, task.query, select(state.meta, "net"), state.meta | state.fixed
        if self.statistics == "population":
            z, seen = self.embed_training(state, net, torch.cat([support.x, query.x]), task.key)
            z_support, z_query = z.split([support.x.shape[0], query.x.shape[0]])
            return self.judged(weights, self.learn(weights, z_support, support), z_query, query, seen)
        learner = self.adapt(state, support, task.unlabelled, key=task.key)
        z, seen = self.embed_queries(state, net, learner.reference, query.x, task.key)
        return self.judged(weights, learner.head, z, query, seen)
