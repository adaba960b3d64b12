"""Heads that classify all queries of a task together, on embeddings of a trained backbone."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import grad

from metalearn.algorithms.embedding import EmbeddingAlgorithm, Examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransductiveHead(EmbeddingAlgorithm):
    """A head that is a function `compare` of the support examples and of all queries of a task.

    Its backbone is trained on batches, by a classifier over all training classes.
    """

    sources: ClassVar[tuple[str, ...]] = ("batches",)
    is_transductive: ClassVar[bool] = True
    is_iterative: ClassVar[bool] = True


def means_of(learned: Examples) -> Tensor:
    """Compute the class means [N, D] of the support set."""
    return learned.y.T @ learned.z / learned.y.sum(0).unsqueeze(-1)


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int, lr: float) -> Tensor:
    """Minimise a loss [] of a tensor by Adam with its usual settings (Kingma and Ba 2015)."""
    value, mean, square = start, torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, steps + 1):
        gradient = grad(loss)(value)
        mean, square = mean.lerp(gradient, 0.1), square.lerp(gradient.square(), 0.001)
        scale = (square / (1 - 0.999**step)).sqrt() + 1e-8
        value = value - lr * mean / (1 - 0.9**step) / scale
    return value
