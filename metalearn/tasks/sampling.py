"""Episodes and batches as functions of (seed, split, number), drawn on the device.

Legend: T tasks, N ways, K shots, Q queries a class, C classes, M inputs of the largest class, B inputs of a batch.
"""

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from metalearn.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.store import ClassView, Store
from metalearn.tasks.types import Batch, Query, Support, Task

#: Version of the rules by which tasks are drawn; results of different versions are of different episodes.
SAMPLER_VERSION = 2
#: Numbers of the random streams, so that equal seeds give different tasks in different splits.
STREAMS = {"train": 0, "val": 1, "test": 2}


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of an episode: classes, and support, query and unlabelled examples of each class.

    distractors: number of further classes of which only unlabelled examples are drawn.
    """

    way: int
    shot: int
    query: int
    unlabelled: int = 0
    distractors: int = 0


class BatchSource(Protocol):
    """Anything that a method can be trained on."""

    def draw(self, first: int | Tensor, count: int) -> Task | Batch:
        """Return tasks number first .. first + count - 1, batched: a leading T everywhere.

        Args:
            first: a number, or int64 [] on the device, which is never read on the host.
            count: T.
        """


class TaskSource(BatchSource, Protocol):
    """Tasks to train or test on."""

    def draw(self, first: int | Tensor, count: int) -> Task:
        """Return tasks as in `BatchSource`."""

    def classes(self, first: int, count: int) -> Tensor | None:
        """Return the class of the split that each label of these tasks stands for: int64 [T, N]; None for regression."""


def numbered_keys(key: Tensor, first: int | Tensor, count: int) -> Tensor:
    """Return the keys of the tasks number first .. first + count - 1: int64 [T]."""
    return prng.fold_in(key, first + torch.arange(count, device=key.device))


@dataclasses.dataclass(frozen=True)
class EpisodeSampler:
    """N-way K-shot episodes of a split; support, query and unlabelled examples share no input.

    Raises:
        UserError: for a shape that the classes cannot fill.
    """

    store: Store
    view: ClassView
    shape: Shape
    key: Tensor

    def __post_init__(self) -> None:
        shape, index = self.shape, self.view.index
        if shape.way < 2:
            raise UserError(f"way={shape.way} leaves nothing to tell apart; choose 2 or more")
        if shape.distractors and not shape.unlabelled:
            raise UserError(
                f"distractors={shape.distractors} needs unlabelled examples; set episode.unlabelled"
            )
        needed, more = (
            shape.way + shape.distractors,
            f" + distractors = {shape.way} + {shape.distractors}",
        )
        if needed > self.view.max_way:
            words = f"way{more if shape.distractors else f'={shape.way}'}"
            raise UserError(f"{words} is larger than the {self.view.max_way} classes of the split")
        smallest = int(index.counts.min())
        parts = {"shot": shape.shot, "query": shape.query} | (
            {"unlabelled": shape.unlabelled} if shape.unlabelled else {}
        )
        if sum(parts.values()) > smallest:
            name = index.names[int(index.counts.argmin())]
            raise UserError(
                f"{' + '.join(parts)} = {' + '.join(map(str, parts.values()))} is larger than class '{name}' with its "
                f"{smallest} examples"
            )

    def draw(self, first: int | Tensor, count: int) -> Task:
        shape, index = self.shape, self.view.index
        key_T = numbered_keys(self.key, first, count)
        classes_TN, rotations_TN = self.view.choose(key_T, shape.way + shape.distractors)
        rows_TNM, counts_TN = index.rows[classes_TN], index.counts[classes_TN]

        # The inputs with the smallest random numbers; padding is never among them.
        key_TN = prng.fold_in(
            prng.fold_in(key_T, 2).unsqueeze(-1), self.view.drawing_ids(classes_TN, rotations_TN)
        )
        padding = torch.arange(rows_TNM.shape[-1], device=key_T.device) >= counts_TN[..., None]
        picks = prng.smallest(key_TN, padding, shape.shot + shape.query + shape.unlabelled)
        rows = rows_TNM.gather(-1, picks)
        if rotations_TN is not None:
            rows = rows + len(self.store) * rotations_TN.unsqueeze(-1)

        support, query, unlabelled = rows.split([shape.shot, shape.query, shape.unlabelled], -1)
        x, y = self._shuffled(support[:, : shape.way], prng.fold_in(key_T, 3))
        query_x, query_y = self._shuffled(query[:, : shape.way], prng.fold_in(key_T, 4))
        more = self._shuffled(unlabelled, prng.fold_in(key_T, 6))[0] if shape.unlabelled else None
        return Task(Support(x, y, shape.way, more), Query(query_x, query_y), prng.fold_in(key_T, 5))

    def classes(self, first: int, count: int) -> Tensor:
        needed = self.shape.way + self.shape.distractors
        return self.view.choose(numbered_keys(self.key, first, count), needed)[0][
            :, : self.shape.way
        ]

    def _shuffled(self, rows_TNK: Tensor, key_T: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and labels in random order, so that no position tells a class."""
        _, way, each = rows_TNK.shape
        order = prng.permutation(key_T, way * each)
        x = self.store.gather(rows_TNK.flatten(1).gather(1, order), prng.fold_in(key_T, 0))
        return x, order // each


@dataclasses.dataclass(frozen=True)
class BatchSampler:
    """Ordinary batches; labels are 0..C-1 over the classes of the split, as the view counts them."""

    store: Store
    view: ClassView
    size: int
    key: Tensor

    def __post_init__(self) -> None:
        _ = self.view.index.num_inputs  # read once, so that drawing reads nothing on the host

    def draw(self, first: int | Tensor, count: int) -> Batch:
        index = self.view.index
        key_T = numbered_keys(self.key, first, count)
        # Uniform over inputs, not over classes: number of an input -> its class, by the running sum of the counts.
        ends = index.counts.cumsum(0)
        number = prng.integers(prng.fold_in(key_T, 0), (self.size,), index.num_inputs)
        classes = torch.searchsorted(ends, number, right=True)
        rows = index.rows[classes, number - (ends[classes] - index.counts[classes])]
        rotations, y = self.view.rotate(key_T, classes, self.size)
        if rotations is not None:
            rows = rows + len(self.store) * rotations
        return Batch(self.store.gather(rows, prng.fold_in(key_T, 3)), y, prng.fold_in(key_T, 2))
