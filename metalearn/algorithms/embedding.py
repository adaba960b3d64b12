"""Methods with a head over embeddings: learn from the support set, then compare queries with it.

A head is written once. Depending on `sources`, its backbone is trained on episodes, through the
head, or on labelled batches, through a classifier over all training classes.
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from metalearn.algorithms.batches import BatchTraining
from metalearn.algorithms.geometry import one_hot
from metalearn.algorithms.params import prefixed, select
from metalearn.tasks import prng
from metalearn.tasks.family import Supervised
from metalearn.tasks.types import Loss, Params, Query, Spec, State, Support, Task


class Examples(NamedTuple):
    """Embeddings z [M, D] of the support set and its one-hot labels y [M, N]."""

    z: Tensor
    y: Tensor


class EmbeddingLearner(NamedTuple):
    """A learner: the result of `learn`, and what normalisation needs at prediction."""

    head: Any
    reference: Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingAlgorithm(BatchTraining):
    """A method that learns from embeddings of the support set and compares queries with it.

    A method implements `compare`, and perhaps `learn`. It overrides `init_head` if its head has
    weights, and `embedding_loss` if its objective is not the loss of its predictions. The argument
    `weights` holds the parameters and buffers of the state.

    In training on episodes with `statistics=population`, support and query are embedded in one
    batch, as in the code of ProtoNet's authors.
    """

    sources: ClassVar[tuple[str, ...]] = ("episodes",)

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        """Create the parameters of the head for embeddings of size D; key: int64 []."""
        return {}

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Any:
        """Learn from a support set; the default keeps the examples.

        Args:
            weights: Parameters and buffers of the state.
            z: Embeddings [M, D] of `support.x`. With `uses_unlabelled`, [M + U, D]: those of
                `support.unlabelled` follow.
            support: Labels y [M] and way N.
            key: int64 [], for random choices.

        Returns:
            Any pytree of tensors.
        """
        return Examples(z, one_hot(support.y, support.way).to(z.dtype))

    def compare(self, weights: Params, learned: Any, z: Tensor) -> Tensor:
        """Compute logits [Q, N] for query embeddings z [Q, D]."""
        raise NotImplementedError

    def embedding_loss(
        self, weights: Params, learned: Any, z: Tensor, query: Query, statistics: Params
    ) -> Loss:
        """Compute the loss for query embeddings z [Q, D] and add the statistics to it."""
        prediction = self.compare(weights, learned, z)
        return self.supervised.make_loss(
            self.supervised.loss(prediction, query.y), prediction, query.y, statistics
        )

    @property
    def supervised(self) -> Supervised:
        """Return the family, which for these methods always has labels."""
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
    ) -> EmbeddingLearner:
        z, reference = self.normalisation.embed_support(state, self._support_inputs(support))
        return EmbeddingLearner(
            self.learn(state.params | state.buffers, z, support, key), reference
        )

    def forward(
        self, state: State, learner: EmbeddingLearner, x: Tensor, key: Tensor | None
    ) -> tuple[Tensor, Params]:
        net = select(state.params, "net")
        z, statistics = self.normalisation.embed_queries(state, net, learner.reference, x, key)
        return self.compare(state.params | state.buffers, learner.head, z), statistics

    def loss(self, state: State, task: Task, progress: Tensor) -> Loss:
        support, query = task.support, task.query
        net, weights = select(state.params, "net"), state.params | state.buffers
        if self.normalisation.has_population:
            support_x = self._support_inputs(support)
            z, statistics = self.normalisation.embed_batch(
                state, net, torch.cat([support_x, query.x]), task.key
            )
            z_support, z_query = z.split([len(support_x), len(query.x)])
            learned = self.learn(weights, z_support, support, task.key)
            return self.embedding_loss(weights, learned, z_query, query, statistics)
        learner = self.adapt(state, support, key=task.key)
        z, statistics = self.normalisation.embed_queries(
            state, net, learner.reference, query.x, task.key
        )
        return self.embedding_loss(weights, learner.head, z, query, statistics)

    def _support_inputs(self, support: Support) -> Tensor:
        """Return the inputs [M, *X] or [M + U, *X] whose embeddings are passed to `learn`."""
        if self.uses_unlabelled and support.unlabelled is not None:
            return torch.cat([support.x, support.unlabelled])
        return support.x
