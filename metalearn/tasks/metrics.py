"""Define the metrics that score tasks."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Metric:
    """A score of predictions.

    `of` maps (prediction [..., Q, N], y) to scores [...]. Of control: (rewards [..., H, M], y) for
    M trajectories of H steps.
    """

    name: str
    higher_is_better: bool
    of: Callable[[Tensor, Tensor], Tensor]

    def better(self, new: float, old: float) -> bool:
        """Return True if `new` is better than `old`."""
        return new > old if self.higher_is_better else new < old


def one_hot(y: Tensor, way: int) -> Tensor:
    """Compute one-hot labels: int64 [M] -> bool [M, N]. Unlike torch's, it exports any N."""
    return y.unsqueeze(-1) == torch.arange(way, device=y.device)


def _classes(y: Tensor) -> Tensor:
    """Return labels [..., Q], also of probabilities [..., Q, N]: the most probable one counts."""
    return y.argmax(-1) if y.is_floating_point() else y


def class_errors(prediction: Tensor, y: Tensor) -> Tensor:
    """Count the wrong predictions and the queries of each class: -> float32 [2, N]."""
    y = _classes(y)
    asked = one_hot(y, prediction.shape[-1]).float()
    wrong = asked * (prediction.argmax(-1) != y)[:, None]
    return torch.stack([wrong.sum(0), asked.sum(0)])


ACCURACY = Metric(
    "accuracy", True, lambda prediction, y: (prediction.argmax(-1) == _classes(y)).float().mean(-1)
)
MEAN_SQUARED_ERROR = Metric(
    "mse", False, lambda prediction, y: (prediction - y).square().mean((-2, -1))
)
#: The mean undiscounted return of trajectories.
RETURN = Metric("return", True, lambda rewards, y: rewards.sum(-2).mean(-1))
