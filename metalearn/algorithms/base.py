"""The interface of every method: two pure functions of one task, and a loss.

Legend of shapes: M support examples, Q queries, N ways.
"""

import dataclasses
from typing import Any, ClassVar

from torch import Tensor

from metalearn.algorithms.normalisation import STATISTICS, Normalisation
from metalearn.backbones.base import Backbone
from metalearn.settings import given_by_run
from metalearn.tasks.family import CLASSIFICATION, TaskFamily
from metalearn.tasks.types import Batch, Loss, Params, Query, Spec, State, Support, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A few-shot method, written for one task; the engine batches it over tasks.

    A method writes `init`, `adapt` and `forward`, and overrides `loss` only where its objective is not the loss of predicting
    the query set. All are pure: nothing is changed in place, random numbers come from `key`, no value is read on the host.
    """

    #: Kinds of target the method can learn: "class", "value", "control".
    targets: ClassVar[tuple[str, ...]] = ("class",)
    #: What the method can train on: "episodes", "batches" (ordinary batches with labels over all training classes).
    sources: ClassVar[tuple[str, ...]] = ("episodes",)
    #: Whether the number of ways is part of the weights, so that training and test must agree on it.
    fixed_way: ClassVar[bool] = False
    #: Whether predictions depend on the query set as a whole, whatever the statistics.
    is_transductive: ClassVar[bool] = False
    #: Whether `adapt` takes a number of steps.
    adapts_in_steps: ClassVar[bool] = False
    #: Whether adaptation is a chain of many small operations, which are worth batching over tasks.
    is_iterative: ClassVar[bool] = False
    #: Whether training descends the family's loss, and whether adaptation does (`loss.name`, `loss.inner`).
    uses_loss: ClassVar[bool] = True
    uses_inner_loss: ClassVar[bool] = False
    #: Whether `adapt` uses `support.unlabelled`.
    uses_unlabelled: ClassVar[bool] = False
    #: Whether predictions follow a permutation of the classes, and whether they depend on the order of the support set.
    class_equivariant: ClassVar[bool] = True
    support_order_matters: ClassVar[bool] = False

    backbone: Backbone = given_by_run()
    statistics: str = given_by_run()
    family: TaskFamily = given_by_run(CLASSIFICATION)
    source: str = given_by_run("episodes")

    @property
    def training_steps(self) -> int | None:
        """Number of adaptation steps while meta-training; None: as in testing."""
        return None

    @property
    def can_rematerialise(self) -> bool:
        """Whether inner steps can be computed again in the backward pass (`engine.rematerialise`)."""
        return False

    @property
    def normalisation(self) -> Normalisation:
        """How support sets and queries are normalised, by the run's `statistics`."""
        return STATISTICS[self.statistics](self.backbone)

    def init(self, spec: Spec, key: Tensor) -> State:
        """Return the initial state, on the key's device. key: int64 []."""
        raise NotImplementedError

    def adapt(
        self, state: State, support: Support, *, key: Tensor, steps: int | None = None
    ) -> Any:
        """Learn from a support set.

        Args:
            state: meta-trained parameters and buffers.
            support: x [M, *X], y [M], perhaps unlabelled [U, *X].
            key: int64 [], for random choices.
            steps: number of adaptation steps; None for the test's.

        Returns:
            A learner: any pytree of tensors.
        """
        raise NotImplementedError

    def forward(
        self, state: State, learner: Any, x: Tensor, key: Tensor | None
    ) -> tuple[Tensor, Params]:
        """Compute outputs for queries.

        Args:
            state: meta-trained parameters and buffers.
            learner: as `adapt` returns it.
            x: [Q, *X].
            key: int64 [] while meta-training, for the backbone's noise; None for a prediction.

        Returns:
            Logits or values [Q, N], and normalisation statistics, named as in `State.buffers`.
        """
        raise NotImplementedError

    def predict(self, state: State, learner: Any, x: Tensor) -> Tensor:
        """Compute logits or values [Q, N] for new inputs x [Q, *X]; labels are never seen."""
        return self.forward(state, learner, x, None)[0]

    def loss(self, state: State, task: Task, progress: Tensor) -> Loss:
        """Compute the loss of predicting the query set after adapting to the support set.

        Args:
            state: meta-trained parameters and buffers.
            task: one task.
            progress: [], the share of meta-training that is done, in [0, 1].
        """
        learner = self.adapt(state, task.support, key=task.key, steps=self.training_steps)
        return self.query_loss(state, learner, task.query, task.key)

    def batch_loss(self, state: State, batch: Batch, progress: Tensor) -> Loss:
        """Compute the loss of an ordinary batch, for methods that train on "batches"; arguments as in `loss`."""
        raise NotImplementedError

    def stage(self, progress: float) -> "Algorithm":
        """Return the method as it is from this share of meta-training on, so that finished phases cost nothing."""
        return self

    def query_loss(self, state: State, learner: Any, query: Query, key: Tensor) -> Loss:
        """Compute the family's loss of predicting queries with a learner."""
        return self.family.query_loss(
            lambda learner, x: self.forward(state, learner, x, key), learner, query, key
        )

    def score(self, state: State, learner: Any, query: Query, key: Tensor) -> Tensor:
        """Compute the family's score [] of a learner."""
        return self.family.score(
            lambda learner, x: self.forward(state, learner, x, None), learner, query, key
        )
