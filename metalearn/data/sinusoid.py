"""Sinusoid regression (Finn et al. 2017, 5.1): y = amplitude * sin(x - phase) + noise, drawn on the device."""

import dataclasses
import hashlib
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from metalearn import random
from metalearn.episodes import STREAMS, Shape, numbered_keys
from metalearn.errors import UserError
from metalearn.settings import at_least
from metalearn.types import Labelled, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sinusoid:
    """Ranges [low, high] of amplitude, phase (radians) and input, and the standard deviation of the noise."""

    amplitude: list[float]
    phase: list[float]
    x: list[float]
    noise: float = at_least(0)
    target: ClassVar[str] = "value"

    def __post_init__(self) -> None:
        for name in ("amplitude", "phase", "x"):
            bounds = getattr(self, name)
            if len(bounds) != 2 or bounds[0] > bounds[1]:
                raise UserError(f"dataset.{name}={list(bounds)} should be [low, high] with low <= high")

    def files(self, data_dir: Path) -> list[Path]:
        """None are read."""
        return []

    def open(self, data_dir: Path, cache_dir: Path, device: torch.device) -> "SinusoidData":
        """Needs no files."""
        return SinusoidData(self, device)


class SinusoidData:
    """Hands out task sources; an episode's `shot` and `query` are numbers of points, its `way` is 1."""

    target = Sinusoid.target
    input_shape = (1,)
    standardisation: ClassVar[dict[str, list[float]]] = {}

    def __init__(self, settings: Sinusoid, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.content_hash = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]

    def class_names(self, split: str) -> tuple[str, ...]:
        return ()

    def num_classes(self, split: str) -> int:
        return 0

    def protocol(self, split: str) -> dict[str, object]:
        """What of the data a measurement on this split depends on."""
        return {"data": self.content_hash}

    def episodes(self, split: str, shape: Shape, seed: int) -> "SinusoidEpisodes":
        """Regression tasks of a split."""
        if shape.way != 1:
            raise UserError(f"{split} episodes: way={shape.way} has no meaning for regression; leave it at 1")
        return SinusoidEpisodes(self.settings, shape, random.key_of(seed, STREAMS[split], device=self.device))

    def batches(self, split: str, batch: int, seed: int) -> "SinusoidBatches":
        """Points of all tasks mixed: each example from a task of its own."""
        episodes = self.episodes(split, Shape(1, 1, 1), seed)
        return SinusoidBatches(episodes, batch)


@dataclasses.dataclass(frozen=True)
class SinusoidEpisodes:
    """x [T, M, 1], y [T, M, 1]."""

    settings: Sinusoid
    shape: Shape
    key: Tensor

    def classes(self, first: int, count: int) -> None:
        return None

    def draw(self, first: int | Tensor, count: int) -> Task:
        key_T = numbered_keys(self.key, first, count)

        def between(number: int, bounds: list[float], size: int) -> Tensor:
            low, high = bounds
            return low + (high - low) * random.uniform(random.fold_in(key_T, number), (size, 1))

        support, query = self.shape.shot, self.shape.query
        amplitude = between(0, self.settings.amplitude, 1)
        phase = between(1, self.settings.phase, 1)
        x = between(2, self.settings.x, support + query)
        noise = self.settings.noise * random.normal(random.fold_in(key_T, 3), (support + query, 1))
        y = amplitude * torch.sin(x - phase) + noise
        return Task(
            Labelled(x[:, :support], y[:, :support], 1),
            Labelled(x[:, support:], y[:, support:], 1),
            random.fold_in(key_T, 4),
        )


@dataclasses.dataclass(frozen=True)
class SinusoidBatches:
    """Ordinary batches: one query point of each of `batch` tasks."""

    episodes: SinusoidEpisodes
    batch: int

    def draw(self, first: int | Tensor, count: int) -> Task:
        points = self.episodes.draw(first * self.batch, count * self.batch)
        x, y = (part.view(count, self.batch, 1) for part in (points.query.x, points.query.y))
        return Task(Labelled(x[:, :0], y[:, :0], 1), Labelled(x, y, 1), points.key.view(count, self.batch)[:, 0])
