"""Datasets whose tasks are sampled from a distribution, and have no classes."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metalearn.data.base import OpenDataset
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.sampling import STREAMS, BatchSource, Shape, TaskSource
from metalearn.tasks.store import Augmentation
from metalearn.tasks.types import Batch, InputSpec


def check_range(name: str, bounds: list[float]) -> None:
    """Raise UserError unless a setting is [low, high]."""
    if len(bounds) != 2 or bounds[0] > bounds[1]:
        raise UserError(f"dataset.{name}={list(bounds)} should be [low, high] with low <= high")


def uniform(key_T: Tensor, bounds: list[float], shape: tuple[int, ...]) -> Tensor:
    """Draw numbers in a range [low, high], float32 [T, *shape]."""
    low, high = bounds
    return low + (high - low) * prng.uniform(key_T, shape)


class SampledData(OpenDataset):
    """An opened dataset whose `shot` and `query` are numbers of examples; `way` is 1.

    `size` is that of an input and of outputs, `content` what results depend on, `kind` what its
    tasks are called; `make` returns the tasks of a shape and a key, int64 [], on a device.
    """

    def __init__(
        self,
        size: int,
        content: object,
        kind: str,
        make: Callable[[Shape, Tensor], TaskSource],
        device: torch.device,
    ) -> None:
        self.inputs, self.outputs = InputSpec((size,)), size
        self.content_hash = hashlib.sha256(repr(content).encode()).hexdigest()[:16]
        self._kind, self._make, self._device = kind, make, device

    def episodes(
        self, split: str, shape: Shape, seed: int, augment: Augmentation | None = None
    ) -> TaskSource:
        """Return the tasks of a split; raise UserError unless `way` is 1."""
        if shape.way != 1:
            raise UserError(
                f"{split} episodes: way={shape.way} does not apply to {self._kind}; should be 1"
            )
        return self._make(shape, prng.key_of(seed, STREAMS[split], device=self._device))

    def batches(
        self, split: str, size: int, seed: int, augment: Augmentation | None = None
    ) -> BatchSource:
        """Return batches of one query of each of `size` tasks."""
        return _QueryBatches(self.episodes(split, Shape(1, 1, 1), seed), size)


@dataclasses.dataclass(frozen=True)
class _QueryBatches:
    episodes: Any
    size: int

    def draw(self, first: int | Tensor, count: int) -> Batch:
        task = self.episodes.draw(first * self.size, count * self.size)
        x, y = (part.view(count, self.size, -1) for part in (task.query.x, task.query.y))
        return Batch(x, y, task.key.view(count, self.size)[:, 0])
