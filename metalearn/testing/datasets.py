"""Contract checks for datasets."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from metalearn.data.base import Dataset
from metalearn.tasks.sampling import Shape
from metalearn.tasks.types import Task


@dataclasses.dataclass(frozen=True)
class DatasetCase:
    """A dataset under test, as `check_dataset` takes it."""

    dataset: Dataset
    data_dir: Path
    cache_dir: Path
    shape: Shape

    @functools.cached_property
    def opened(self) -> Any:
        """Return the opened dataset."""
        return self.dataset.open(self.data_dir, self.cache_dir, torch.device("cpu"))

    @property
    def has_examples(self) -> bool:
        """Return True if tasks have labelled examples; control has initial states instead."""
        return self.dataset.family(None, None, {}).predicts

    def tasks(self, split: str, seed: int = 0, count: int = 4) -> Task:
        """Draw tasks of a split."""
        task: Task = self.opened.episodes(split, self.shape, seed).draw(0, count)
        return task


def opens_the_same_again(case: DatasetCase) -> None:
    """A dataset that is opened again has the same data; its protocol is plain data."""
    again = case.dataset.open(case.data_dir, case.cache_dir, torch.device("cpu"))
    assert again.content_hash == case.opened.content_hash
    for split in ("train", "val", "test"):
        assert json.loads(json.dumps(again.protocol(split))) == case.opened.protocol(split)
        assert again.class_names(split) == case.opened.class_names(split)


def splits_share_no_class(case: DatasetCase) -> None:
    """No class is in two splits."""
    names = [case.opened.class_names(split) for split in ("train", "val", "test")]
    together = [name for each in names for name in each]
    assert len(together) == len(set(together))


def tasks_have_their_shape(case: DatasetCase) -> None:
    """Inputs, labels, unlabelled examples and keys have the shapes and types of the contract."""
    shape, inputs = case.shape, case.opened.inputs
    for split in ("train", "val", "test"):
        task = case.tasks(split)
        for part, each in ((task.support, shape.shot), (task.query, shape.query)):
            assert part.x.shape == (4, shape.way * each, *inputs.shape)
            assert part.x.dtype == (torch.int64 if inputs.kind == "tokens" else torch.float32)
            if case.dataset.target == "class":
                assert part.y.dtype == torch.int64
                assert (
                    part.y.sort(-1).values == torch.arange(shape.way).repeat_interleave(each)
                ).all()
        assert task.support.way == shape.way
        assert task.key.shape == (4,) and task.key.unique().numel() == 4


def tasks_depend_on_seed_and_number(case: DatasetCase) -> None:
    """A task is a function of seed, split and number, however tasks are grouped."""
    source = case.opened.episodes("train", case.shape, 0)
    together, apart = source.draw(0, 4), [source.draw(first, 2) for first in (0, torch.tensor(2))]
    assert torch.equal(together.query.x, torch.cat([part.query.x for part in apart]))
    assert torch.equal(together.support.y, torch.cat([part.support.y for part in apart]))
    what = "x" if case.has_examples else "y"
    other = case.tasks("train", seed=1)
    assert not torch.equal(getattr(together.query, what), getattr(other.query, what))


def support_and_query_are_disjoint(case: DatasetCase) -> None:
    """No query of a task equals a support example."""
    if not case.has_examples:
        return
    task = case.tasks("train", count=8)
    for support, query in zip(task.support.x.flatten(2), task.query.x.flatten(2), strict=True):
        assert not (support[:, None] == query[None]).all(-1).any(), (
            "a query is also in the support set"
        )


def batches_have_global_labels(case: DatasetCase) -> None:
    """Batches have inputs of the same shape, and global labels."""
    if not case.has_examples:
        return
    batch = case.opened.batches("train", 64, 0).draw(0, 3)
    assert batch.x.shape == (3, 64, *case.opened.inputs.shape)
    assert batch.key.shape == (3,)
    if case.dataset.target == "class":
        assert 0 <= batch.y.min() <= batch.y.max() < case.opened.num_classes("train")


DATASET_CHECKS: dict[str, Callable[[DatasetCase], None]] = {
    check.__name__: check
    for check in (
        opens_the_same_again, splits_share_no_class, tasks_have_their_shape,
        tasks_depend_on_seed_and_number, support_and_query_are_disjoint,
        batches_have_global_labels,
    )
}  # fmt: skip


def check_dataset(
    dataset: Dataset, data_dir: Path, cache_dir: Path, shape: Shape | None = None
) -> None:
    """Check that a dataset fulfils the contract of every dataset.

    Args:
        dataset: Its settings.
        data_dir: Folder of its files.
        cache_dir: Folder for decoded data.
        shape: Shape of an episode that it can fill; None: 3-way (regression: 1-way), 1 shot,
            2 queries.

    Raises:
        AssertionError: If it violates the contract.
    """
    way = 3 if dataset.target == "class" else 1
    case = DatasetCase(dataset, data_dir, cache_dir, shape or Shape(way, 1, 2))
    for check in DATASET_CHECKS.values():
        check(case)
