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


def _accuracy(prediction: Tensor, y: Tensor) -> Tensor:
    """Compute the fraction of correct labels [...]: logits [..., Q, N], labels [..., Q].

    Labels may be probabilities [..., Q, N]; the most probable one counts.
    """
    if y.is_floating_point():
        y = y.argmax(-1)
    return (prediction.argmax(-1) == y).to(torch.float32).mean(-1)


def class_errors(prediction: Tensor, y: Tensor) -> Tensor:
    """Count the wrong predictions and the queries of each class: -> float32 [2, N]."""
    if y.is_floating_point():
        y = y.argmax(-1)
    asked = (y[:, None] == torch.arange(prediction.shape[-1], device=y.device)).float()
    wrong = asked * (prediction.argmax(-1) != y)[:, None]
    return torch.stack([wrong.sum(0), asked.sum(0)])


def _squared_error(prediction: Tensor, y: Tensor) -> Tensor:
    """Compute the mean squared error: [..., Q, D], [..., Q, D] -> [...]."""
    return (prediction - y).square().mean((-2, -1))


def _mean_return(rewards: Tensor, y: Tensor) -> Tensor:
    """Compute the mean undiscounted return of trajectories: [..., H, M] -> [...]."""
    return rewards.sum(-2).mean(-1)


ACCURACY = Metric("accuracy", True, _accuracy)
MEAN_SQUARED_ERROR = Metric("mse", False, _squared_error)
RETURN = Metric("return", True, _mean_return)
