"""Define task families: their inner loss, their meta-training loss and their score.

A gradient-based method takes its losses from the family, so one method runs on classification,
regression and control.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from metalearn.tasks.losses import LOSSES, LossFunction
from metalearn.tasks.metrics import ACCURACY, MEAN_SQUARED_ERROR, Metric, class_errors
from metalearn.tasks.types import CLASS_ERRORS, Batch, Loss, Params, Query, Spec, Support

#: (parameters, inputs [B, *X]) -> (outputs [B, N], normalisation statistics of this pass).
#: Parameters may be any pytree.
Net = Callable[[Any, Tensor], tuple[Tensor, Params]]


class TaskFamily:
    """Define what all tasks of a dataset share.

    Every function is pure. Random numbers come from `key`.
    """

    target: str  # the kind of the tasks, one of `Algorithm.targets`
    metric: Metric  # scores a task
    predicts: bool  # whether outputs are predictions of `query.y`, one per query

    def init(self, spec: Spec, key: Tensor) -> Params:
        """Return the family's parameters ("head.…"), which adapt with the head; {} if none."""
        return {}

    def support_loss(self, net: Net, params: Any, support: Support, key: Tensor) -> Tensor:
        """Compute the loss [] that an inner loop minimises; each step has a new key."""
        raise NotImplementedError

    def query_loss(self, net: Net, params: Any, query: Query | Batch, key: Tensor) -> Loss:
        """Compute the loss that meta-training minimises, its logs and normalisation statistics."""
        raise NotImplementedError

    def score(self, net: Net, params: Any, query: Query, key: Tensor) -> Tensor:
        """Compute the score [] of a task with `metric`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Supervised(TaskFamily):
    """Tasks with targets: outputs are compared with `y`, by `inner_loss` in inner loops.

    `counts_errors`: logs have `CLASS_ERRORS`, for classes.
    """

    target: str
    metric: Metric
    loss: LossFunction
    inner_loss: LossFunction
    predicts: bool = True
    counts_errors: bool = False

    def support_loss(self, net: Net, params: Any, support: Support, key: Tensor) -> Tensor:
        return self.inner_loss(net(params, support.x)[0], support.y)

    def query_loss(self, net: Net, params: Any, query: Query | Batch, key: Tensor) -> Loss:
        prediction, statistics = net(params, query.x)
        return self.make_loss(self.loss(prediction, query.y), prediction, query.y, statistics)

    def make_loss(self, value: Tensor, prediction: Tensor, y: Tensor, statistics: Params) -> Loss:
        """Return a `Loss` that logs its value and the score of the prediction."""
        logs = {"loss": value.detach(), self.metric.name: self.metric.of(prediction.detach(), y)}
        if self.counts_errors:
            logs[CLASS_ERRORS] = class_errors(prediction.detach(), y)
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

    Losses are names in `LOSSES` or functions; None for the default. `settings` are further
    arguments of `loss`, the loss of queries and batches.
    """
    losses = LOSSES[target]
    default = next(iter(losses.values()))

    def function(loss: str | LossFunction | None) -> LossFunction:
        return default if loss is None else losses[loss] if isinstance(loss, str) else loss

    outer = functools.partial(function(loss), **settings) if settings else function(loss)
    return Supervised(target, METRICS[target], outer, function(inner_loss))


CLASSIFICATION = supervised("class")
