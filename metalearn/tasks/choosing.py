"""Choose the classes of episodes (`episode.sampler`).

Legend: T tasks, C classes of the index, G superclasses.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from metalearn.system.errors import UserError
from metalearn.tasks import prng

#: Weight of each step in the recent error of a class.
_RATE = 0.1
#: Added to the errors of classes, so that those without error are drawn too.
_FLOOR = 0.1


@dataclasses.dataclass(frozen=True)
class Superclasses:
    """All classes of an episode are of one superclass, uniform among those with enough classes."""

    number: Tensor  # superclass of each class, int64 [C]
    sizes: Tensor  # number of classes of each superclass, int64 [G]
    largest: tuple[str, int]  # name of the largest superclass, and its number of classes

    @staticmethod
    def of(names: Sequence[str], device: torch.device) -> "Superclasses":
        """Return the superclasses of these names, one for each class."""
        known = sorted(set(names))
        number = torch.tensor([known.index(name) for name in names])
        sizes = number.bincount()
        most = int(sizes.argmax())
        return Superclasses(number.to(device), sizes.to(device), (known[most], int(sizes[most])))

    def excluded(self, key: Tensor, copies: int, count: int) -> Tensor:
        """Draw a superclass; return which classes are not of it, bool [T, copies * C]."""
        chosen = prng.smallest(key, self.sizes * copies < count, 1)
        return self.number.repeat(copies) != chosen


@dataclasses.dataclass(frozen=True)
class HardClasses:
    """The classes of an episode are drawn one after the other in proportion to 0.1 + error.

    `errors` has the recent error of each class, float32 [C]; `record` changes it in place.
    """

    errors: Tensor

    def record(self, wrong: Tensor, asked: Tensor, is_counted: Tensor) -> None:
        """Move the recent errors a tenth of the way towards the errors of a step.

        Wrong predictions and queries of each class are float32 [C]; without queries, or unless the
        step counts (bool []), nothing changes.
        """
        is_new = (asked > 0) & is_counted
        new = torch.where(is_new, wrong / asked.clamp_min(1), self.errors)
        self.errors.lerp_(new, _RATE)


@dataclasses.dataclass(frozen=True)
class Chooser:
    """Choose the classes of episodes; uniformly, unless a field says otherwise."""

    superclasses: Superclasses | None = None
    hard: HardClasses | None = None

    def max_way(self, size: int) -> int:
        """Return the largest number of classes in an episode, of `size` classes."""
        return size if self.superclasses is None else self.superclasses.largest[1]

    def choose(self, key: Tensor, size: int, copies: int, count: int) -> Tensor:
        """Draw `count` different numbers below copies * size, for keys [T]: int64 [T, count].

        Each class c of `size` has the numbers c, c + size, c + 2 size, and so on. `count` is at
        most `copies * max_way`.
        """
        own, total = prng.fold_in(key, 0), copies * size
        if self.superclasses is None and self.hard is None:
            return prng.choice(own, total, count)
        excluded = torch.zeros(total, dtype=torch.bool, device=key.device)
        if self.superclasses is not None:
            excluded = self.superclasses.excluded(prng.fold_in(key, 7), copies, count)
        if self.hard is None:
            return prng.smallest(own, excluded, count)
        weights = (self.hard.errors.double() + _FLOOR).repeat(copies)
        return prng.weighted(own, weights.masked_fill(excluded, 0), count)


def chooser(
    sampler: str, superclasses: Sequence[str], parts: Sequence[str], rows: Tensor
) -> Chooser:
    """Return the chooser of a sampler: "uniform", "hierarchical" or "hard".

    Superclasses and parts (which no episode leaves) have a name for each class; () for none. Raise
    UserError for a hierarchical sampler without superclasses.
    """
    if sampler == "hierarchical" and not superclasses:
        raise UserError(
            "sampler=hierarchical: the classes of this dataset have no superclasses; use "
            "sampler=uniform"
        )
    names = superclasses if sampler == "hierarchical" else parts
    return Chooser(
        Superclasses.of(names, rows.device) if names else None,
        HardClasses(torch.ones(len(rows), device=rows.device)) if sampler == "hard" else None,
    )
