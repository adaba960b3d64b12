"""Sinusoid regression (Finn et al. 2017, 5.1): y = amplitude * sin(x - phase) + noise.

Tasks are sampled on the device.
"""

import dataclasses
import functools
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from metalearn.config.fields import at_least, setting
from metalearn.data.base import Dataset
from metalearn.data.sampled import SampledData, check_range, uniform
from metalearn.tasks import prng
from metalearn.tasks.sampling import Shape, TaskSource, numbered_keys
from metalearn.tasks.types import Query, Support, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sinusoid(Dataset):
    """Sinusoids with random amplitude and phase.

    Amplitude, phase (radians) and inputs have ranges [low, high]; `noise` is a standard deviation.
    """

    target: ClassVar[str] = "value"

    amplitude: list[float] = setting()
    phase: list[float] = setting()
    x: list[float] = setting()
    noise: float = at_least(0)

    def __post_init__(self) -> None:
        for name in ("amplitude", "phase", "x"):
            check_range(name, getattr(self, name))

    def open(self, data_dir: Path, cache_dir: Path, device: torch.device) -> SampledData:
        make = functools.partial(SinusoidEpisodes, self)
        return SampledData(1, self, "regression", make, device)


@dataclasses.dataclass(frozen=True)
class SinusoidEpisodes(TaskSource):
    """Tasks with x [T, M, 1] and y [T, M, 1]."""

    settings: Sinusoid
    shape: Shape
    key: Tensor

    def draw(self, first: int | Tensor, count: int) -> Task:
        key_T = numbered_keys(self.key, first, count)
        support, query = self.shape.shot, self.shape.query
        amplitude = uniform(prng.fold_in(key_T, 0), self.settings.amplitude, (1, 1))
        phase = uniform(prng.fold_in(key_T, 1), self.settings.phase, (1, 1))
        x = uniform(prng.fold_in(key_T, 2), self.settings.x, (support + query, 1))
        noise = self.settings.noise * prng.normal(prng.fold_in(key_T, 3), (support + query, 1))
        y = amplitude * torch.sin(x - phase) + noise
        return Task(
            Support(x[:, :support], y[:, :support], 1),
            Query(x[:, support:], y[:, support:]),
            prng.fold_in(key_T, 4),
        )
