"""Episodes as a function of (seed, split, number of the task), drawn on the device.

Legend: T tasks, N ways, K shots, Q queries a class, C classes, M images of the largest class.
"""

import dataclasses
import functools
from typing import Protocol

import torch
from torch import Tensor

from metalearn import random
from metalearn.errors import UserError
from metalearn.types import Labelled, Task

#: Numbers of the random streams, so that equal seeds give different tasks in different splits.
STREAMS = {"train": 0, "val": 1, "test": 2}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Classes, support and query examples a class of one episode."""

    way: int
    shot: int
    query: int


class TaskSource(Protocol):
    """Anything the loop can train or test on."""

    def draw(self, first: int | Tensor, count: int) -> Task:
        """Tasks number first .. first + count - 1, batched: a leading T everywhere.

        first: a number, or int64 [] on the device, which is never fetched from there.
        """


class EpisodeSource(TaskSource, Protocol):
    """Episodes to test on."""

    def classes(self, first: int, count: int) -> Tensor | None:
        """Which class of the split each label of these episodes stands for: int64 [T, N]; None for regression."""


@dataclasses.dataclass(frozen=True)
class ImageStore:
    """Pictures on the device. images: uint8 [I, C, H, W]; shift, scale: float32 [C, 1, 1], applied to x / 255."""

    images: Tensor
    shift: Tensor
    scale: Tensor

    def pictures(self, rows: Tensor, turns: Tensor | None) -> Tensor:
        """Pictures float32 [*rows, C, H, W], each turned by `turns` [*rows] quarter turns, and standardised."""
        x = self.images[rows]
        if turns is not None:
            turns = turns[..., None, None, None]
            x = torch.where(turns >= 2, x.flip((-2, -1)), x)
            x = torch.where(turns % 2 == 1, x.rot90(1, (-2, -1)), x)
        return (x.to(torch.float32) / 255 - self.shift) * self.scale


@dataclasses.dataclass(frozen=True)
class ClassTable:
    """The classes of one split. rows: int64 [C, M], padded; counts: int64 [C]; names: of each class.

    turned: each class stands for four, one a quarter turn. turned_may_meet: two of those four may meet in an episode.
    turn_in_episode: each class of each episode is turned at random.
    """

    rows: Tensor
    counts: Tensor
    names: tuple[str, ...]
    turned: bool
    turned_may_meet: bool
    turn_in_episode: bool

    @functools.cached_property
    def num_images(self) -> int:
        return int(self.counts.sum())

    @property
    def num_classes(self) -> int:
        return self.rows.shape[0] * (4 if self.turned else 1)


def numbered_keys(key: Tensor, first: int | Tensor, count: int) -> Tensor:
    """Keys of the tasks number first .. first + count - 1: int64 [T]."""
    return random.fold_in(key, first + torch.arange(count, device=key.device))


def _choose(key: Tensor, size: int, count: int) -> Tensor:
    """`count` different numbers below `size`: key [T] -> int64 [T, count]."""
    return random.uniform(key, (size,)).topk(count).indices


@dataclasses.dataclass(frozen=True)
class ImageEpisodes:
    """N-way K-shot episodes of a split; support and query share no image by construction."""

    store: ImageStore
    table: ClassTable
    shape: Shape
    key: Tensor

    def __post_init__(self) -> None:
        shape, table = self.shape, self.table
        different = table.num_classes if table.turned_may_meet else table.rows.shape[0]
        if shape.way < 2:
            raise UserError(f"way={shape.way} leaves nothing to tell apart; choose 2 or more")
        if shape.way > different:
            raise UserError(f"way={shape.way} is larger than the {different} classes of the split")
        smallest = int(table.counts.min())
        if shape.shot + shape.query > smallest:
            name = table.names[int(table.counts.argmin())]
            raise UserError(
                f"shot + query = {shape.shot} + {shape.query} is larger than class '{name}' with its {smallest} images"
            )

    def draw(self, first: int | Tensor, count: int) -> Task:
        shape, table = self.shape, self.table
        key_T = numbered_keys(self.key, first, count)
        classes_TN, turns_TN = self._classes(key_T)
        rows_TNM, counts_TN = table.rows[classes_TN], table.counts[classes_TN]

        # The images with the K + Q smallest random numbers; padding never wins. The numbers belong to the character,
        # so that where two rotations of one meet, no drawing is support of one and query of the other.
        key_TN = random.fold_in(random.fold_in(key_T, 2).unsqueeze(-1), classes_TN)
        order = random.uniform(key_TN, rows_TNM.shape[2:])
        padding = torch.arange(rows_TNM.shape[-1], device=order.device) >= counts_TN[..., None]
        picks = order.masked_fill(padding, 2.0).topk(shape.shot + shape.query, largest=False).indices
        rows = rows_TNM.gather(-1, picks)

        return Task(
            support=self._labelled(rows[..., : shape.shot], turns_TN, random.fold_in(key_T, 3)),
            query=self._labelled(rows[..., shape.shot :], turns_TN, random.fold_in(key_T, 4)),
            key=random.fold_in(key_T, 5),
        )

    def classes(self, first: int, count: int) -> Tensor:
        return self._classes(numbered_keys(self.key, first, count))[0]

    def _classes(self, key_T: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows of the class table [T, N] and quarter turns [T, N]."""
        way, num_rows = self.shape.way, self.table.rows.shape[0]
        key_classes, key_turns = random.fold_in(key_T, 0), random.fold_in(key_T, 1)
        if self.table.turned and self.table.turned_may_meet:
            chosen = _choose(key_classes, 4 * num_rows, way)
            return chosen % num_rows, chosen // num_rows
        classes = _choose(key_classes, num_rows, way)
        if self.table.turned or self.table.turn_in_episode:
            return classes, random.integers(key_turns, (way,), 4)
        return classes, None

    def _labelled(self, rows_TNK: Tensor, turns_TN: Tensor | None, key_T: Tensor) -> Labelled:
        """The pictures in random order, so that no position tells a class."""
        _, way, each = rows_TNK.shape
        order = random.permutation(key_T, way * each)
        rows = rows_TNK.flatten(1).gather(1, order)
        y = order // each
        turns = None if turns_TN is None else turns_TN.gather(1, y)
        return Labelled(self.store.pictures(rows, turns), y, way)


@dataclasses.dataclass(frozen=True)
class ImageBatches:
    """Ordinary batches with global labels, for transfer baselines: tasks with an empty support set.

    Labels are 0..C-1 over the classes of the split, each quarter turn a class of its own where classes are turned.
    """

    store: ImageStore
    table: ClassTable
    batch: int
    key: Tensor

    def draw(self, first: int | Tensor, count: int) -> Task:
        table = self.table
        key_T = numbered_keys(self.key, first, count)
        # Uniform over images, not over classes: image number -> class by its place in the running sum of the counts.
        ends = table.counts.cumsum(0)
        image = random.integers(random.fold_in(key_T, 0), (self.batch,), table.num_images)
        row = torch.searchsorted(ends, image, right=True)
        rows = table.rows[row, image - (ends[row] - table.counts[row])]
        turns = None
        if table.turned or table.turn_in_episode:
            turns = random.integers(random.fold_in(key_T, 1), (self.batch,), 4)
        y = row if turns is None or not table.turned else row + turns * table.rows.shape[0]
        nothing = Labelled(self.store.pictures(rows[:, :0], None), y[:, :0], table.num_classes)
        query = Labelled(self.store.pictures(rows, turns), y, table.num_classes)
        return Task(nothing, query, random.fold_in(key_T, 2))
