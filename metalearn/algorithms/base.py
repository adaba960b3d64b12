"""Define the interface of a few-shot method: two pure functions of one task, and a loss.

Legend of shapes: M support examples, Q queries, N ways.
"""

import dataclasses
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from metalearn.algorithms.normalisation import STATISTICS, Normalisation
from metalearn.backbones.base import Backbone
from metalearn.config.fields import given_by_run
from metalearn.tasks.family import CLASSIFICATION, TaskFamily
from metalearn.tasks.types import Batch, Loss, Params, Query, Spec, State, Support, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A few-shot method, written for one task; the engine batches it over tasks.

    A method implements `init`, `adapt` and `forward`. It overrides `loss` only if its objective is
    not the loss of predicting the query set. All are pure: they change nothing in place, take
    random numbers from `key`, and read no value on the host.
    """

    #: Kinds of target that the method can learn: "class", "value", "control".
    targets: ClassVar[tuple[str, ...]] = ("class",)
    #: What the method can train on: "episodes", "batches" (labels over all training classes).
    sources: ClassVar[tuple[str, ...]] = ("episodes",)
    #: Number of views of each example of an ordinary batch, each with its own augmentation.
    num_views: ClassVar[int] = 1
    #: True if the number of ways is part of the weights, so training and test must use the same.
    fixed_way: ClassVar[bool] = False
    #: True if a prediction depends on the other queries under any `statistics`.
    is_transductive: ClassVar[bool] = False
    #: True if `adapt` uses its argument `steps`.
    adapts_in_steps: ClassVar[bool] = False
    #: True if adaptation is a chain of many small operations, so batching over tasks pays off.
    is_iterative: ClassVar[bool] = False
    #: True if training minimises the family's loss (`loss.name`).
    uses_loss: ClassVar[bool] = True
    #: True if that loss can use probabilities as the labels of queries (`augment.mix`).
    accepts_soft_labels: ClassVar[bool] = True
    #: True if adaptation minimises the family's inner loss (`loss.inner`).
    uses_inner_loss: ClassVar[bool] = False
    #: True if adaptation takes gradients of a loss, so it is no graph of plain operations.
    takes_gradients: ClassVar[bool] = False
    #: True if `adapt` uses `support.unlabelled`.
    uses_unlabelled: ClassVar[bool] = False
    #: True if each class must have the same number of support examples.
    needs_equal_shots: ClassVar[bool] = False
    #: True if permuting the classes permutes the predictions in the same way.
    class_equivariant: ClassVar[bool] = True
    #: True if predictions depend on the order of the support set.
    support_order_matters: ClassVar[bool] = False
    #: Number of adaptation steps in meta-training; None means as in testing.
    training_steps: ClassVar[int | None] = None
    #: Number of copies (`augment.support`) that replace a support example in tests; 0: none.
    support_copies: ClassVar[int] = 0
    #: True if the backward pass can recompute inner steps (`engine.rematerialise`).
    can_rematerialise: ClassVar[bool] = False

    backbone: Backbone = given_by_run()
    statistics: str = given_by_run()
    family: TaskFamily = given_by_run(CLASSIFICATION)
    source: str = given_by_run("episodes")

    @property
    def network(self) -> Backbone:
        """Return the backbone that embeds; a method may change how it does."""
        return self.backbone

    @property
    def normalisation(self) -> Normalisation:
        """Return the normalisation of support sets and queries that `statistics` names."""
        return STATISTICS[self.statistics](self.network)

    def init(self, spec: Spec, key: Tensor) -> State:
        """Create the initial state on the device of `key`, int64 []."""
        raise NotImplementedError

    def adapt(
        self, state: State, support: Support, *, key: Tensor, steps: int | None = None
    ) -> Any:
        """Learn from a support set.

        Args:
            state: Meta-trained parameters and buffers.
            support: x [M, *X], y [M], optionally unlabelled [U, *X].
            key: int64 [], for random choices.
            steps: Number of adaptation steps; None for the number used in testing.

        Returns:
            A learner: any pytree of tensors.
        """
        raise NotImplementedError

    def forward(
        self, state: State, learner: Any, x: Tensor, key: Tensor | None
    ) -> tuple[Tensor, Params]:
        """Compute outputs for queries.

        Args:
            state: Meta-trained parameters and buffers.
            learner: The result of `adapt`.
            x: Queries [Q, *X].
            key: int64 [] in meta-training, for the backbone's noise; None for a prediction.

        Returns:
            Logits or values [Q, N], and normalisation statistics named as in `State.buffers`.
        """
        raise NotImplementedError

    def predict(self, state: State, learner: Any, x: Tensor) -> Tensor:
        """Compute logits or values [Q, N] for new inputs x [Q, *X], without their labels."""
        return self.forward(state, learner, x, None)[0]

    def loss(self, state: State, task: Task, progress: Tensor) -> Loss:
        """Compute the loss of predicting the query set after adapting to the support set.

        `progress` [] is the fraction of meta-training that is done, in [0, 1].
        """
        learner = self.adapt(state, task.support, key=task.key, steps=self.training_steps)
        return self.query_loss(state, learner, task.query, task.key)

    def similarity(self, weights: Params, z: Tensor, others: Tensor) -> Tensor:
        """Compute how similar embeddings [Q, D] and [M, D] are, [Q, M]: by default their cosine.

        `weights` holds the parameters and buffers of the state.
        """
        return F.normalize(z, dim=-1) @ F.normalize(others, dim=-1).T

    def batch_loss(self, state: State, batch: Batch, progress: Tensor) -> Loss:
        """Compute the loss of a batch, if `sources` has "batches"; arguments as in `loss`."""
        raise NotImplementedError

    def stage(self, progress: float) -> "Algorithm":
        """Return the method to use from this progress on, so that finished phases cost nothing."""
        return self

    def query_loss(self, state: State, learner: Any, query: Query, key: Tensor) -> Loss:
        """Compute the family's loss of a learner on queries."""
        return self.family.query_loss(
            lambda learner, x: self.forward(state, learner, x, key), learner, query, key
        )

    def score(self, state: State, learner: Any, query: Query, key: Tensor) -> Tensor:
        """Compute the family's score [] of a learner on queries."""
        return self.family.score(
            lambda learner, x: self.forward(state, learner, x, None), learner, query, key
        )
