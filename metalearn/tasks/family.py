"""Families of tasks: how a task is learned from, what meta-training descends, and how a task is scored.

A method that adapts by gradients asks the family for its losses, so that one method runs on classes, on values and on control.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from metalearn.tasks.losses import LOSSES, LossFunction
from metalearn.tasks.metrics import ACCURACY, MEAN_SQUARED_ERROR, Metric
from metalearn.tasks.types import Batch, Loss, Params, Query, Spec, Support

#: (parameters, inputs [B, *X]) -> (outputs [B, N], normalisation statistics seen). Parameters may be any pytree.
Net = Callable[[Any, Tensor], tuple[Tensor, Params]]


class TaskFamily(Protocol):
    """What all tasks of a dataset have in common. Every function is pure, and random numbers come from `key`.

    target: the kind of its tasks, as `Algorithm.targets` lists them; metric: how a task is scored; predicts: whether outputs
    are predictions of `query.y`, so that they can be looked at one by one.
    """

    @property
    def target(self) -> str: ...

    @property
    def metric(self) -> Metric: ...

    @property
    def predicts(self) -> bool: ...

    def init(self, spec: Spec, key: Tensor) -> Params:
        """Return parameters of the family's own, which adapt with the head ("head.…"); {} where it has none."""

    def support_loss(self, net: Net, params: Any, support: Support, key: Tensor) -> Tensor:
        """Return the loss [] that an inner loop descends. key: int64 [], a new one for each inner step."""

    def query_loss(self, net: Net, params: Any, query: Query | Batch, key: Tensor) -> Loss:
        """Return the loss that meta-training descends, with logs ("loss" among them) and normalisation statistics."""

    def score(self, net: Net, params: Any, query: Query, key: Tensor) -> Tensor:
        """Return the score [] of a task, by `metric`."""


@dataclasses.dataclass(frozen=True)
class Supervised:
    """Tasks with right answers: outputs are compared with `y`.

    loss: of queries and batches; inner_loss: of inner loops.
    """

    target: str
    metric: Metric
    loss: LossFunction
    inner_loss: LossFunction
    predicts: bool = True

    def init(self, spec: Spec, key: Tensor) -> Params:
        return {}

    def support_loss(self, net: Net, params: Any, support: Support, key: Tensor) -> Tensor:
        return self.inner_loss(net(params, support.x)[0], support.y)

    def query_loss(self, net: Net, params: Any, query: Query | Batch, key: Tensor) -> Loss:
        prediction, statistics = net(params, query.x)
        return self.judge(self.loss(prediction, query.y), prediction, query.y, statistics)

    def judge(self, value: Tensor, prediction: Tensor, y: Tensor, statistics: Params) -> Loss:
        """Return a loss of this value whose logs are the value and the score of the prediction."""
        logs = {"loss": value.detach(), self.metric.name: self.metric.of(prediction.detach(), y)}
        return Loss(value, logs, statistics)

    def score(self, net: Net, params: Any, query: Query, key: Tensor) -> Tensor:
        return self.metric.of(net(params, query.x)[0], query.y)


METRICS = {"class": ACCURACY, "value": MEAN_SQUARED_ERROR}


def supervised(
    target: str,
    loss: str | LossFunction | None = None,
    inner_loss: str | LossFunction | None = None,
    settings: Mapping[str, Any] = {},
) -> Supervised:
    """Return the family of classification ("class") or regression ("value").

    Args:
        target: "class" or "value".
        loss: of queries and batches, a name in `LOSSES` or a function; None for the usual one.
        inner_loss: of inner loops, likewise.
        settings: further arguments of `loss`.
    """
    named = LOSSES[target]
    usual = next(iter(named.values()))

    def function(loss: str | LossFunction | None) -> LossFunction:
        return usual if loss is None else named[loss] if isinstance(loss, str) else loss

    outer = functools.partial(function(loss), **settings) if settings else function(loss)
    return Supervised(target, METRICS[target], outer, function(inner_loss))


CLASSIFICATION, REGRESSION = supervised("class"), supervised("value")
