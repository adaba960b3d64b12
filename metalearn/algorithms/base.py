"""What every method shares: the interface, the default loss, and normalisation at prediction.

Legend of shapes: M support examples, Q queries, N ways, D features.
"""

import dataclasses
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from metalearn.settings import given_by_run
from metalearn.types import SCORES, Backbone, Labelled, Loss, Params, Spec, State, Task


def objective(prediction: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of logits [Q, N] for class indices [Q], or mean squared error for targets [Q, D]: []."""
    return F.mse_loss(prediction, y) if y.is_floating_point() else F.cross_entropy(prediction, y)


def select(params: Params, prefix: str) -> Params:
    """The entries under `prefix.`, without it."""
    return {name[len(prefix) + 1 :]: value for name, value in params.items() if name.startswith(f"{prefix}.")}


def prefixed(params: Params, prefix: str) -> Params:
    """The same entries under `prefix.`."""
    return {f"{prefix}.{name}": value for name, value in params.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A few-shot method, written for one task; the engine batches it over tasks.

    A method writes `init`, `adapt` and `forward`, and overrides `loss` only where its objective is another than
    predicting the query set. All are pure: nothing inside them is mutated, random numbers come from `key`.
    """

    #: Kinds of target the method can learn: "class", "value".
    targets: ClassVar[tuple[str, ...]] = ("class",)
    #: Where the method can train: "episodes", "batches" (ordinary batches with global labels).
    sources: ClassVar[tuple[str, ...]] = ("episodes",)
    #: Whether the number of ways is part of the weights, so that training and test must agree on it.
    fixed_way: ClassVar[bool] = False
    #: What the method promises under a permutation of the classes and of the support set; the tests hold it to that.
    class_equivariant: ClassVar[bool] = True
    support_order_matters: ClassVar[bool] = False

    backbone: Backbone = given_by_run()
    statistics: str = given_by_run()

    @property
    def training_steps(self) -> int | None:
        """The number of adaptation steps while meta-training; None: as in testing."""
        return None

    @property
    def adapts_in_steps(self) -> bool:
        """Whether adaptation is a chain of small steps, which are worth batching over tasks."""
        return self.training_steps is not None

    def init(self, spec: Spec, key: Tensor) -> State:
        """The initial state, on the key's device."""
        raise NotImplementedError

    def adapt(
        self,
        state: State,
        support: Labelled,
        unlabelled: Tensor | None = None,
        *,
        key: Tensor,
        steps: int | None = None,
    ) -> Any:
        """Learns from the support set: any pytree of tensors.

        Args: unlabelled: [U, *X] or None; key: int64 [], for random choices; steps: None for the test's number.
        """
        raise NotImplementedError

    def forward(self, state: State, learner: Any, x: Tensor, key: Tensor | None) -> tuple[Tensor, Params]:
        """Logits or values [Q, N] for x [Q, *X], and the normalisation statistics seen (named as in `fixed`).

        Args: key: int64 [], for the backbone's noise while meta-training; None: a prediction, without noise.
        """
        raise NotImplementedError

    def predict(self, state: State, learner: Any, x: Tensor) -> Tensor:
        """Logits or values [Q, N] for new inputs x [Q, *X]; labels are never seen."""
        return self.forward(state, learner, x, None)[0]

    def loss(self, state: State, task: Task, progress: Tensor) -> Loss:
        """The objective of predicting the query set after adapting to the support set.

        Args: progress: [] share of meta-training done, in [0, 1].
        """
        learner = self.adapt(state, task.support, task.unlabelled, key=task.key, steps=self.training_steps)
        return self.query_loss(state, learner, task.query, task.key)

    def stage(self, progress: float) -> "Algorithm":
        """The method as it is once this share of meta-training is done, so that a part that is over costs nothing any more."""
        return self

    def query_loss(self, state: State, learner: Any, query: Labelled, key: Tensor) -> Loss:
        """The default objective, given what adaptation returned."""
        prediction, statistics = self.forward(state, learner, query.x, key)
        return self.scored(objective(prediction, query.y), prediction, query.y, statistics)

    def scored(self, value: Tensor, prediction: Tensor, y: Tensor, statistics: Params) -> Loss:
        """A `Loss` whose logs are the value and the score of the prediction."""
        score = SCORES["value" if y.is_floating_point() else "class"]
        return Loss(value, {"loss": value.detach(), score.name: score.of(prediction.detach(), y)}, statistics)

    # Normalisation at prediction, alike for all methods: what a learner must keep, and how queries are embedded with it.

    def reference(self, params: Params, support_x: Tensor) -> Params:
        """What the chosen statistics need of the support set, for adapted backbone weights `params`."""
        if self.statistics == "support":
            return self.backbone.embed(params, support_x, collect=True)[1]
        return {"x": support_x} if self.statistics == "support_plus_one" else {}

    def own_statistics(self, state: State) -> Params:
        """Statistics by which support sets and batches are normalised everywhere, training included: a frozen backbone's, where the
        run has population statistics; else none, so that each is normalised by its own.
        """
        kept = self.statistics == "population" and getattr(self.backbone, "frozen", False)
        return select(state.fixed, "net") if kept else {}

    def embed_support(self, state: State, x: Tensor) -> tuple[Tensor, Params]:
        """Embeddings [M, D] of x [M, *X] by an unadapted backbone, and the reference that queries are normalised by."""
        net = select(state.meta, "net")
        given = select(state.fixed, "net") if self.statistics == "population" else None
        return self.backbone.embed(net, x, given)[0], self.reference(net, x)

    def embed_queries(
        self, state: State, params: Params, reference: Params, x: Tensor, key: Tensor | None
    ) -> tuple[Tensor, Params]:
        """Embeddings [Q, D] of x [Q, *X] under the run's statistics, and the statistics seen; key: see `forward`."""
        embed = self.backbone.embed
        if self.statistics == "support":
            return embed(params, x, given=reference, key=key)[0], {}
        if self.statistics == "support_plus_one":
            support_x = reference["x"]

            def embed_one(x_one: Tensor) -> Tensor:
                return embed(params, torch.cat([support_x, x_one[None]]), key=key)[0][-1]

            return vmap(embed_one)(x), {}
        if self.statistics == "population" and key is None:
            return embed(params, x, given=select(state.fixed, "net"))[0], {}
        return self.embed_training(state, params, x, key)

    def embed_training(self, state: State, params: Params, x: Tensor, key: Tensor | None) -> tuple[Tensor, Params]:
        """Embeddings [B, D] of a batch while meta-training, and the statistics to fold into the population's, if it has any.

        A batch is normalised by its own statistics, unless there are `own_statistics`.
        """
        if given := self.own_statistics(state):
            return self.backbone.embed(params, x, given=given, key=key)[0], {}
        z, seen = self.backbone.embed(params, x, collect=self.statistics == "population", key=key)
        return z, prefixed(seen, "net")
