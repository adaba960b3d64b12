"""Sinusoid regression (Finn et al. 2017, 5.1): y = amplitude * sin(x - phase) + noise.

Tasks are sampled on the device.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from metalearn.config.fields import at_least, setting
from metalearn.data.base import Dataset
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.sampling import STREAMS, Shape, numbered_keys
from metalearn.tasks.store import Augmentation
from metalearn.tasks.types import Batch, InputSpec, Query, Support, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sinusoid(Dataset):
    """Sinusoids with random amplitude and phase.

    Args:
        amplitude: Range [low, high].
        phase: Range [low, high], radians.
        x: Range [low, high] of the inputs.
        noise: Standard deviation.
    """

    target: ClassVar[str] = "value"

    amplitude: list[float] = setting()
    phase: list[float] = setting()
    x: list[float] = setting()
    noise: float = at_least(0)

    def __post_init__(self) -> None:
        for name in ("amplitude", "phase", "x"):
            bounds = getattr(self, name)
            if len(bounds) != 2 or bounds[0] > bounds[1]:
                raise UserError(
                    f"dataset.{name}={list(bounds)} should be [low, high] with low <= high"
                )

    def open(self, data_dir: Path, cache_dir: Path, device: torch.device) -> "SinusoidData":
        return SinusoidData(self, device)


class SinusoidData:
    """An opened dataset whose `shot` and `query` are numbers of points; `way` is 1."""

    inputs = InputSpec((1,))
    outputs: int | None = 1

    def __init__(self, settings: Sinusoid, device: torch.device) -> None:
        self.standardisation: dict[str, list[float]] = {}
        self.settings = settings
        self.device = device
        self.content_hash = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]

    def class_names(self, split: str) -> tuple[str, ...]:
        """Return (): regression has no classes."""
        return ()

    def num_classes(self, split: str) -> int:
        """Return 0: regression has no classes."""
        return 0

    def protocol(self, split: str) -> dict[str, object]:
        """Return the hash of the settings."""
        return {"data": self.content_hash}

    def episodes(
        self, split: str, shape: Shape, seed: int, augment: Augmentation | None = None
    ) -> "SinusoidEpisodes":
        """Return the tasks of a split; raise UserError unless `way` is 1."""
        if shape.way != 1:
            raise UserError(
                f"{split} episodes: way={shape.way} does not apply to regression; should be 1"
            )
        return SinusoidEpisodes(
            self.settings, shape, prng.key_of(seed, STREAMS[split], device=self.device)
        )

    def batches(
        self, split: str, size: int, seed: int, augment: Augmentation | None = None
    ) -> "SinusoidBatches":
        """Return batches of one point of each of `size` tasks."""
        return SinusoidBatches(self.episodes(split, Shape(1, 1, 1), seed), size)


@dataclasses.dataclass(frozen=True)
class SinusoidEpisodes:
    """Tasks with x [T, M, 1] and y [T, M, 1]."""

    settings: Sinusoid
    shape: Shape
    key: Tensor

    def classes(self, first: int | Tensor, count: int) -> None:
        """Return None: regression has no classes."""
        return None

    def draw(self, first: int | Tensor, count: int) -> Task:
        """Sample tasks `first` to `first + count - 1`."""
        key_T = numbered_keys(self.key, first, count)

        def between(number: int, bounds: list[float], size: int) -> Tensor:
            low, high = bounds
            return low + (high - low) * prng.uniform(prng.fold_in(key_T, number), (size, 1))

        support, query = self.shape.shot, self.shape.query
        amplitude = between(0, self.settings.amplitude, 1)
        phase = between(1, self.settings.phase, 1)
        x = between(2, self.settings.x, support + query)
        noise = self.settings.noise * prng.normal(prng.fold_in(key_T, 3), (support + query, 1))
        y = amplitude * torch.sin(x - phase) + noise
        return Task(
            Support(x[:, :support], y[:, :support], 1),
            Query(x[:, support:], y[:, support:]),
            prng.fold_in(key_T, 4),
        )


@dataclasses.dataclass(frozen=True)
class SinusoidBatches:
    """Batches of one query point of each of `size` tasks."""

    episodes: SinusoidEpisodes
    size: int

    def draw(self, first: int | Tensor, count: int) -> Batch:
        """Sample batches `first` to `first + count - 1`."""
        points = self.episodes.draw(first * self.size, count * self.size)
        x, y = (part.view(count, self.size, 1) for part in (points.query.x, points.query.y))
        return Batch(x, y, points.key.view(count, self.size)[:, 0])
