"""2D navigation (Finn et al. 2017, 5.3): a point agent walks to a goal that it cannot observe."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from metalearn.config.fields import at_least, between, setting
from metalearn.data.base import Dataset
from metalearn.data.sampled import SampledData, check_range, uniform
from metalearn.tasks import prng
from metalearn.tasks.control import PolicyGradient
from metalearn.tasks.family import TaskFamily
from metalearn.tasks.sampling import Shape, TaskSource, numbered_keys
from metalearn.tasks.types import Query, Support, Task

#: The largest step in each direction, and the distance in each direction that counts as arrival.
_STEP, _ARRIVAL = 0.1, 0.01


@dataclasses.dataclass(frozen=True)
class Plane:
    """The plane, with reward minus the distance to the goal `y` [M, 2].

    As in the authors' code: a step is 0.1 times the action, at most 0.1 in each direction; a
    trajectory ends within 0.01 of the goal in each direction.
    """

    horizon: int

    def step(self, state: Tensor, action: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take one step; see `Environment`."""
        state = state + (_STEP * action).clamp(-_STEP, _STEP)
        rest = state - y
        return state, -rest.square().sum(-1).sqrt(), rest.abs().amax(-1) < _ARRIVAL

    def best_return(self, goal: Tensor) -> Tensor:
        """Compute the return [...] of the best policy that knows the goal [..., 2].

        It walks in both directions at full speed, which makes each distance as small as possible.
        """
        steps = torch.arange(1, self.horizon + 1, device=goal.device)[:, None] * _STEP
        return -(goal.abs().unsqueeze(-2) - steps).clamp_min(0).square().sum(-1).sqrt().sum(-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Navigation(Dataset):
    """Goals that are uniform in a square; every trajectory starts at the origin.

    `discount` and the settings after it are those of `PolicyGradient`.
    """

    target: ClassVar[str] = "control"

    goal: list[float] = setting()
    horizon: int = at_least(1)
    discount: float = between(0, 1)
    dice_lambda: float = between(0, 1)
    standardise: bool = setting()
    initial_log_std: float = setting()

    def __post_init__(self) -> None:
        check_range("goal", self.goal)

    def family(
        self, loss: str | None, inner_loss: str | None, settings: Mapping[str, Any]
    ) -> TaskFamily:
        own = (self.discount, self.dice_lambda, self.standardise, self.initial_log_std)
        return PolicyGradient(Plane(self.horizon), *own)

    def open(self, data_dir: Path, cache_dir: Path, device: torch.device) -> SampledData:
        content, make = (list(self.goal), self.horizon), functools.partial(Goals, self.goal)
        return SampledData(2, content, "control", make, device)


@dataclasses.dataclass(frozen=True)
class Goals(TaskSource):
    """Tasks with initial states x [T, M, 2], the origin, and their goal y [T, M, 2]."""

    bounds: list[float]
    shape: Shape
    key: Tensor

    def draw(self, first: int | Tensor, count: int) -> Task:
        key_T = numbered_keys(self.key, first, count)
        goal = uniform(prng.fold_in(key_T, 0), self.bounds, (1, 2))
        support, query = (goal.expand(-1, size, -1) for size in (self.shape.shot, self.shape.query))
        return Task(
            Support(torch.zeros_like(support), support, 1),
            Query(torch.zeros_like(query), query),
            prng.fold_in(key_T, 1),
        )
