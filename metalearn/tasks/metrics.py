"""Metrics by which tasks are scored."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Metric:
    """A score of predictions, and which direction is better. of: (prediction [..., Q, N], y) -> [...]."""

    name: str
    higher_is_better: bool
    of: Callable[[Tensor, Tensor], Tensor]

    def better(self, new: float, old: float | None) -> bool:
        """Return True if `new` is better than `old`; the first score is."""
        return old is None or (new > old if self.higher_is_better else new < old)


def _accuracy(prediction: Tensor, y: Tensor) -> Tensor:
    """Compute the share of correct labels: logits [..., Q, N], labels [..., Q] -> [...]."""
    return (prediction.argmax(-1) == y).to(torch.float32).mean(-1)


def _squared_error(prediction: Tensor, y: Tensor) -> Tensor:
    """Compute the mean squared error: [..., Q, D], [..., Q, D] -> [...]."""
    return (prediction - y).square().mean((-2, -1))


ACCURACY = Metric("accuracy", True, _accuracy)
MEAN_SQUARED_ERROR = Metric("mse", False, _squared_error)
