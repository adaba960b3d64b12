"""Sample episodes and batches, each a function of (seed, split, number).

They are drawn where the class index is: on the device, or on the host if the inputs are there. What
is drawn is on the device in both cases.

Legend: T tasks, N classes of a task (in `draw`, its distractors follow), C classes of the split,
M inputs of the largest class, or in `_shuffled` of a set.
"""

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.store import ClassView, Store, transferred
from metalearn.tasks.types import Batch, Query, Support, Task
from metalearn.tasks.unbalanced import first_rows, query_counts

#: Version of the sampling rules; different versions give different episodes.
SAMPLER_VERSION = 2
#: Random stream of each split, so that one seed gives different tasks in different splits; "all"
#: has the classes of the other three.
STREAMS = {"train": 0, "val": 1, "test": 2, "all": 3, "train+test": 4}


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of an episode: `shot`, `query` and `unlabelled` are examples per class."""

    way: int
    shot: int
    query: int
    unlabelled: int = 0
    distractors: int = 0  # number of additional classes with unlabelled examples only
    #: The settings that give the shape, for error messages.
    where: str = dataclasses.field(default="episode", compare=False)
    #: Number of augmented copies that replace each support example; 0 for the example.
    copies: int = 0
    sampler: str = "uniform"  # how classes are chosen: "uniform", "hierarchical" or "hard"
    #: Support examples of each class, if they differ; `shot` is then the largest.
    shots: tuple[int, ...] = ()
    #: Parameter of the distribution of the way * query queries over the classes; 0: each class has
    #: the same number.
    dirichlet: int = 0

    @property
    def most_queries(self) -> int:
        """Return the greatest number of queries of a class."""
        return self.query * (self.way if self.dirichlet else 1)

    @property
    def examples(self) -> int:
        """Return the number of examples that each class needs."""
        return self.shot + self.most_queries + self.unlabelled


class BatchSource(Protocol):
    """A source of training data for a method."""

    def draw(self, first: int | Tensor, count: int) -> Task | Batch:
        """Draw tasks first .. first + count - 1, each tensor with a leading T.

        Args:
            first: An int, or int64 [] on the device, which is never read on the host; or the
                numbers of all tasks, int64 [T].
            count: T.
        """


class TaskSource(BatchSource, Protocol):
    """A source of tasks for training or testing."""

    def draw(self, first: int | Tensor, count: int) -> Task:
        """Draw tasks as in `BatchSource`."""

    def classes(self, first: int | Tensor, count: int) -> Tensor | None:
        """Return the index in the split of each label's class, int64 [T, N]; None without classes.

        Arguments as in `draw`.
        """
        return None


def numbered_keys(key: Tensor, first: int | Tensor, count: int) -> Tensor:
    """Return the keys of tasks, int64 [T]; arguments as in `BatchSource.draw`."""
    if isinstance(first, Tensor) and first.dim():
        return prng.fold_in(key, first.to(key.device))
    return prng.fold_in(key, first + torch.arange(count, device=key.device))


@dataclasses.dataclass(frozen=True)
class EpisodeSampler(TaskSource):
    """Sample N-way K-shot episodes of a split.

    Support, query and unlabelled examples share no input. Raise UserError if the shape is
    impossible, or the split has too few classes or examples for it.
    """

    store: Store
    view: ClassView
    shape: Shape
    key: Tensor  # int64 []
    support_store: Store | None = None  # inputs of support sets; None for those of `store`

    def __post_init__(self) -> None:
        shape, index = self.shape, self.view.index
        if shape.way < 2:
            raise UserError(f"way={shape.way}: a task needs at least 2 classes; choose 2 or more")
        if shape.distractors and not shape.unlabelled:
            raise UserError(
                f"distractors={shape.distractors}: requires unlabelled examples; "
                f"set {shape.where}.unlabelled"
            )
        groups = self.view.chooser.superclasses
        owner = f"'{groups.largest[0]}', the largest superclass," if groups else "the split"
        self._check(("way", "distractors"), self.view.max_way, owner, "classes")
        name, available = index.smallest
        self._check(("shot", "query", "unlabelled"), available, f"class '{name}'", "examples")
        total = shape.examples
        if shape.dirichlet and total > available:
            raise UserError(
                f"dirichlet={shape.dirichlet}: a task may have {total} examples of one class, its "
                f"support examples and way * query queries, but class '{name}' has only "
                f"{available}; lower {shape.where}.query"
            )

    @property
    def max_shot(self) -> int:
        """Return the largest number of support examples that every class suffices for."""
        return self.view.index.smallest[1] - self.shape.most_queries - self.shape.unlabelled

    def _check(self, names: tuple[str, ...], available: int, owner: str, what: str) -> None:
        """Raise UserError if the shape needs more of something than its owner has."""
        used = {name: value for name in names if (value := getattr(self.shape, name))}
        total = sum(used.values())
        if total > available:
            lower = " or ".join(f"{self.shape.where}.{name}" for name in reversed(used))
            advice = f"{what}; lower {lower}"
            if available < 2:  # the smallest task requires two classes, and two examples of each
                advice = {
                    "classes": "class; add classes to it",
                    "examples": "example; add examples to it, or leave it out",
                }[what]
            raise UserError(
                f"{' + '.join(used)}{'=' if len(used) == 1 else ' = '}{total}, "
                f"but {owner} has only {available} {advice}"
            )

    def draw(self, first: int | Tensor, count: int) -> Task:
        shape, index = self.shape, self.view.index
        key_T = numbered_keys(self.key, first, count)
        classes_TN, rotations_TN = self.view.choose(key_T, shape.way + shape.distractors)
        rows_TNM, counts_TN = index.rows[classes_TN], index.counts[classes_TN]

        # The inputs with the smallest random numbers are drawn; padding never is.
        ids_TN = self.view.image_ids(classes_TN, rotations_TN)
        key_TN = prng.fold_in(prng.fold_in(key_T, 2).unsqueeze(-1), ids_TN)
        padding = torch.arange(rows_TNM.shape[-1], device=key_T.device) >= counts_TN[..., None]
        picks = prng.smallest(key_TN, padding, shape.examples)
        rows = rows_TNM.gather(-1, picks)
        if rotations_TN is not None:
            rows = rows + len(self.store) * rotations_TN.unsqueeze(-1)

        sizes = [shape.shot, shape.most_queries, shape.unlabelled]
        support, query, unlabelled = rows.split(sizes, -1)
        place = torch.arange(shape.way * shape.shot, device=key_T.device)
        if shape.shots:
            kept = [n * shape.shot + k for n, own in enumerate(shape.shots) for k in range(own)]
            place = torch.tensor(kept, device=key_T.device)
        if shape.copies:
            place = place.repeat_interleave(shape.copies)
        own = support.flatten(1)[:, place]
        x, order = self._shuffled(own, prng.fold_in(key_T, 3), self.support_store)
        y = transferred(place[order] // shape.shot, x.device)
        query_x, query_y = self._queries(query[:, : shape.way], prng.fold_in(key_T, 4))
        more = None
        if shape.unlabelled:
            more = self._shuffled(unlabelled.flatten(1), prng.fold_in(key_T, 6))[0]
        key = transferred(prng.fold_in(key_T, 5), x.device)
        return Task(Support(x, y, shape.way, more), Query(query_x, query_y), key)

    def classes(self, first: int | Tensor, count: int) -> Tensor:
        needed = self.shape.way + self.shape.distractors
        key_T = numbered_keys(self.key, first, count)
        return self.view.choose(key_T, needed)[0][:, : self.shape.way]

    def _queries(self, rows_TNK: Tensor, key_T: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and labels of the query set in random order."""
        shape = self.shape
        if not shape.dirichlet:
            x, order = self._shuffled(rows_TNK.flatten(1), key_T)
            return x, transferred(order // shape.query, x.device)
        total = shape.way * shape.query
        counts = query_counts(prng.fold_in(key_T, 1), shape.way, total, shape.dirichlet)
        rows, y = first_rows(rows_TNK, counts, total)
        order = prng.permutation(key_T, total)
        x = self.store.gather(rows.gather(1, order), prng.fold_in(key_T, 0))
        return x, transferred(y.gather(1, order), x.device)

    def _shuffled(
        self, rows_TM: Tensor, key_T: Tensor, store: Store | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return inputs in random order, so that positions reveal no label, and the order."""
        order = prng.permutation(key_T, rows_TM.shape[1])
        x = (store or self.store).gather(rows_TM.gather(1, order), prng.fold_in(key_T, 0))
        return x, order


@dataclasses.dataclass(frozen=True)
class BatchSampler(BatchSource):
    """Sample ordinary batches, with labels 0..C-1 over all classes of the view.

    Each example is there `num_views` times, in adjacent rows: an augmented store changes each row.
    """

    store: Store
    view: ClassView
    size: int
    key: Tensor
    num_views: int = 1

    def __post_init__(self) -> None:
        # Read on the host and cached here, because `draw` must not read from the device.
        _ = self.view.index.num_inputs

    def draw(self, first: int | Tensor, count: int) -> Batch:
        index = self.view.index
        key_T = numbered_keys(self.key, first, count)
        # Uniform over inputs, not over classes. The cumulative counts map an input to its class.
        ends = index.counts.cumsum(0)
        number = prng.integers(prng.fold_in(key_T, 0), (self.size,), index.num_inputs)
        classes = torch.searchsorted(ends, number, right=True)
        rows = index.rows[classes, number - (ends[classes] - index.counts[classes])]
        rotations, y = self.view.rotate(key_T, classes, self.size)
        if rotations is not None:
            rows = rows + len(self.store) * rotations
        if self.num_views > 1:
            rows, y = (part.repeat_interleave(self.num_views, 1) for part in (rows, y))
        x = self.store.gather(rows, prng.fold_in(key_T, 3))
        y, key = (transferred(part, x.device) for part in (y, prng.fold_in(key_T, 2)))
        return Batch(x, y, key)
