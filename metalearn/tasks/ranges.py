"""Draw the shapes of episodes from ranges of ways and shots.

Triantafillou et al. (2020), "Meta-Dataset: A dataset of datasets for learning to learn from few
examples".
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from metalearn.tasks import prng
from metalearn.tasks.sampling import STREAMS, Shape, TaskSource
from metalearn.tasks.types import Task

#: Random stream of the shapes; those of the tasks are `STREAMS`.
_STREAM = 200
#: Largest support set with unbalanced shots, as in Meta-Dataset.
_MAX_SUPPORT = 500


@dataclasses.dataclass(frozen=True)
class Ranges:
    """Ranges from which the shape of an episode is drawn, uniformly and including both ends.

    `unbalanced`: the classes of an episode share way * shot support examples unequally.
    """

    way: tuple[int, int]
    shot: tuple[int, int]
    unbalanced: bool = False

    def draw(self, largest: Shape, most: int, key: Tensor) -> list[Shape]:
        """Draw a shape for each key, int64 [E], on the CPU; `largest` has what does not vary.

        `most` is the largest number of support examples of a class, for unbalanced shots.
        """
        ways, shots = (
            (low + prng.integers(prng.fold_in(key, number), (), high - low + 1)).tolist()
            for number, (low, high) in enumerate((self.way, self.shot))
        )
        sizes = zip(ways, shots, strict=True)
        shapes = [dataclasses.replace(largest, way=way, shot=shot) for way, shot in sizes]
        if self.unbalanced:
            uniform = prng.uniform(prng.fold_in(key, 2), (self.way[1],)).double()
            for number, shape in enumerate(shapes):
                own = unbalanced_shots(shape.way, shape.shot, most, uniform[number])
                shapes[number] = dataclasses.replace(shape, shot=max(own), shots=own)
        return shapes


def unbalanced_shots(way: int, shot: int, most: int, uniform: Tensor) -> tuple[int, ...]:
    """Share a support set unequally between classes (Triantafillou et al. 2020, 3.2.2).

    shot_n = min(floor(R_n (|S| - N)) + 1, most), R_n = exp(a_n) / sum_m exp(a_m), a_n uniform in
    [log 1/2, log 2), |S| = min(500, N shot). With classes of one size, `shot` uniform in 1 to 100
    is theirs. Departure: their R_n also grows with the number of examples of class n. Here, shapes
    are drawn before classes, so that tasks of a meta-batch can share them. a_n comes from uniform
    numbers in [0, 1), float64, at least N.
    """
    size = max(way, min(_MAX_SUPPORT, way * shot))
    weights = 2 ** (2 * uniform[:way] - 1)
    extra = (weights / weights.sum() * (size - way)).floor()
    return tuple((extra.long() + 1).clamp_max(most).tolist())


@dataclasses.dataclass(frozen=True)
class Varied(TaskSource):
    """Tasks whose shape is a function of the seed and of their number."""

    source: Any  # tasks of the largest shape: a dataclass with the fields `shape` and `key`
    ranges: Ranges
    key: Tensor  # key of the shapes, int64 [] on the CPU
    most: int  # see `unbalanced_shots`
    each: int = 1  # number of consecutive tasks that share a shape

    def shapes(self, numbers: Tensor) -> list[Shape]:
        """Return the shapes of tasks, int64 [E] on the CPU."""
        key = prng.fold_in(self.key, numbers // self.each)
        return self.ranges.draw(self.source.shape, self.most, key)

    def at(self, first: int | Tensor) -> TaskSource:
        """Return a source of tasks of the shape of task `first` or of the first of several."""
        number = torch.as_tensor(first).flatten()[:1]
        source: TaskSource = dataclasses.replace(self.source, shape=self.shapes(number)[0])
        return source

    def draw(self, first: int | Tensor, count: int) -> Task:
        """Draw tasks of one shape, that of the first; arguments as in `TaskSource`, on the CPU."""
        return self.at(first).draw(first, count)

    def classes(self, first: int | Tensor, count: int) -> Tensor | None:
        return self.at(first).classes(first, count)


def varied(source: Any, ranges: Ranges | None, split: str, seed: int, each: int = 1) -> TaskSource:
    """Return the tasks of a split in these ranges, or without ranges the source.

    Raise UserError if the smallest shape is impossible.
    """
    if ranges is None:
        own: TaskSource = source
        return own
    smallest = dataclasses.replace(source.shape, way=ranges.way[0])
    dataclasses.replace(source, shape=smallest)  # for its checks
    most = source.max_shot if ranges.unbalanced else source.shape.shot
    return Varied(source, ranges, prng.key_of(seed, _STREAM + STREAMS[split]), most, each)


#: The first task, or the numbers of several tasks, int64 [T] on the CPU, and their number.
Part = tuple[int | Tensor, int]


def parts_of(source: TaskSource, first: int, count: int, size: int) -> list[Part]:
    """Split tasks first .. first + count - 1 into parts of at most `size` tasks of one shape."""
    if not isinstance(source, Varied):
        end = first + count
        return [(at, min(size, end - at)) for at in range(first, end, size)]
    by_shape: dict[Shape, list[int]] = {}
    numbers = torch.arange(first, first + count)
    for number, shape in enumerate(source.shapes(numbers), first):
        by_shape.setdefault(shape, []).append(number)
    groups = [torch.tensor(own).split(size) for own in by_shape.values()]
    return [(part, len(part)) for group in groups for part in group]


def numbers_of(part: Part) -> Tensor:
    """Return the numbers of the tasks of a part, int64 [T] on the CPU."""
    first, count = part
    return first if isinstance(first, Tensor) else first + torch.arange(count)
