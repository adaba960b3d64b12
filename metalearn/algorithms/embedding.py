"""Methods that are a head over embeddings: learn from those of the support set, compare those of queries with it.

A head is written once. Where `sources` says so, its backbone can be trained on episodes, through the head, or on ordinary
batches, by a classifier over all training classes.
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from metalearn.algorithms.batches import BatchTraining
from metalearn.algorithms.params import prefixed, select
from metalearn.tasks import prng
from metalearn.tasks.family import Supervised
from metalearn.tasks.types import Loss, Params, Query, Spec, State, Support, Task


class Examples(NamedTuple):
    """The support set: embeddings [M, D], and its labels [M, N] as ones and zeros."""

    z: Tensor
    y: Tensor


class Learned(NamedTuple):
    """A learner: what `learn` returned, and what the normalisation at prediction needs."""

    head: Any
    reference: Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingAlgorithm(BatchTraining):
    """A method writes `learn` and `compare`; `init_head` where it has weights of its own; `embedding_loss` where its objective
    is not the loss of its predictions. What they get as `weights` is all of the state, parameters and buffers.

    Trained on episodes under `statistics=population`, support and query are embedded in one batch, as ProtoNet's authors do.
    """

    sources: ClassVar[tuple[str, ...]] = ("episodes",)

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        """Return parameters besides the backbone's. size: D; key: int64 []."""
        return {}

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Any:
        """Learn from a support set.

        Args:
            weights: the state, parameters and buffers.
            z: embeddings [M, D] of `support.x`; with `uses_unlabelled`, those of `support.unlabelled` follow: [M + U, D].
            support: its labels y [M] and way N.
            key: int64 [], for random choices.

        Returns:
            Any pytree of tensors.
        """
        raise NotImplementedError

    def compare(self, weights: Params, learned: Any, z: Tensor) -> Tensor:
        """Compute logits [Q, N] of queries with embeddings z [Q, D]."""
        raise NotImplementedError

    def embedding_loss(
        self, weights: Params, learned: Any, z: Tensor, query: Query, statistics: Params
    ) -> Loss:
        """Compute the loss of queries with embeddings z [Q, D]; statistics: to return."""
        prediction = self.compare(weights, learned, z)
        return self.supervised.judge(
            self.supervised.loss(prediction, query.y), prediction, query.y, statistics
        )

    @property
    def supervised(self) -> Supervised:
        """The family, which for these methods is always one with labels."""
        assert isinstance(self.family, Supervised)
        return self.family

    def init(self, spec: Spec, key: Tensor) -> State:
        net, population = self.backbone.init(spec.inputs, prng.fold_in(key, 0))
        size = math.prod(self.backbone.shape(spec.inputs))
        params = prefixed(net, "net") | self.init_head(spec, size, prng.fold_in(key, 1))
        if self.source == "batches":
            params |= self.init_classifier(spec, size, prng.fold_in(key, 1))
        return State(params, prefixed(population, "net"))

    def adapt(
        self, state: State, support: Support, *, key: Tensor, steps: int | None = None
    ) -> Learned:
        z, reference = self.normalisation.embed_support(state, self._learned_from(support))
        return Learned(self.learn(state.params | state.buffers, z, support, key), reference)

    def forward(
        self, state: State, learner: Learned, x: Tensor, key: Tensor | None
    ) -> tuple[Tensor, Params]:
        net = select(state.params, "net")
        z, seen = self.normalisation.embed_queries(state, net, learner.reference, x, key)
        return self.compare(state.params | state.buffers, learner.head, z), seen

    def loss(self, state: State, task: Task, progress: Tensor) -> Loss:
        support, query = task.support, task.query
        net, weights = select(state.params, "net"), state.params | state.buffers
        if self.normalisation.has_population:
            learned_from = self._learned_from(support)
            z, seen = self.normalisation.embed_batch(
                state, net, torch.cat([learned_from, query.x]), task.key
            )
            z_support, z_query = z.split([len(learned_from), len(query.x)])
            learned = self.learn(weights, z_support, support, task.key)
            return self.embedding_loss(weights, learned, z_query, query, seen)
        learner = self.adapt(state, support, key=task.key)
        z, seen = self.normalisation.embed_queries(state, net, learner.reference, query.x, task.key)
        return self.embedding_loss(weights, learner.head, z, query, seen)

    def _learned_from(self, support: Support) -> Tensor:
        """Return the inputs [M, *X] or [M + U, *X] whose embeddings `learn` gets."""
        if self.uses_unlabelled and support.unlabelled is not None:
            return torch.cat([support.x, support.unlabelled])
        return support.x
