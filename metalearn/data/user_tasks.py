"""Each task is one user of a table: predict the user's other rows from a few (cold start).

Legend: U users of a split, G groups of a user's rows (one for values, else one per class), T tasks.
"""

import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from metalearn.config.fields import at_least, setting
from metalearn.data.base import Dataset, OpenDataset
from metalearn.data.class_splits import random_split
from metalearn.data.tables import read_csv
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.sampling import STREAMS, BatchSource, Shape, TaskSource, numbered_keys
from metalearn.tasks.store import Augmentation
from metalearn.tasks.types import Batch, InputSpec, Query, Support, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserValues(Dataset):
    """A CSV file with a header and a row for each value that a user gave, such as a rating.

    No user is in two splits. A row that repeats the features of another row of its user is left
    out, so that no query is in the support set.
    """

    target: ClassVar[str] = "value"

    path: str = setting()
    user: str = setting()
    value: str = setting()
    features: list[str] = setting()
    standardise: bool = setting()
    split_seed: int = setting()
    fractions: list[float] = at_least(0)

    def files(self, data_dir: Path) -> list[Path]:
        return [data_dir / Path(self.path).expanduser()]

    def open(self, data_dir: Path, cache_dir: Path, device: torch.device) -> "UserData":
        path = self.files(data_dir)[0]
        if not path.is_file():
            raise UserError(
                f"dataset.path={self.path}: there is no file {path}; it should be a CSV file with "
                "a row for each user and item"
            )
        header, *rows = read_csv(path) or [[]]
        header = [name.strip() for name in header]
        features = self.features or [one for one in header if one not in (self.user, self.value)]
        for key, name in [
            ("user", self.user), ("value", self.value), *(("features", one) for one in features)
        ]:  # fmt: skip
            if name not in header:
                raise UserError(
                    f"dataset.{key}={name}: {path} has no such column; it has {', '.join(header)}"
                )
        for number, row in enumerate(rows, 2):
            if len(row) != len(header):
                raise UserError(f"{path}: row {number} has {len(row)} cells, not {len(header)}")
        if not features or not rows:
            raise UserError(f"{path} has no rows, or no columns except for user and value")
        table = np.array(rows, dtype=np.str_).reshape(len(rows), len(header))
        cells = {name: np.char.strip(table[:, place]) for place, name in enumerate(header)}
        x = np.stack([_numbers(path, name, cells[name]) for name in features], 1)
        y, classes = self._targets(path, cells[self.value])
        # Rows of one user, and of one class of a user, follow each other in any order of the file.
        names, user = np.unique(cells[self.user], return_inverse=True)
        group = y if classes else np.zeros(len(y), np.int64)
        keys = np.column_stack([user, x])
        _, first = np.unique(keys, axis=0, return_index=True)
        if repeated := len(x) - len(first):
            logging.getLogger(__name__).warning(
                f"{self.path}: {repeated} rows repeat the features of another row of their user, "
                "and are left out"
            )
        order = np.lexsort((first, group[first], user[first]))
        rows_of = first[order]
        x, y, user, group = x[rows_of], y[rows_of], user[rows_of], group[rows_of]
        groups = max(1, len(classes))
        counts = np.bincount(user * groups + group, minlength=len(names) * groups)
        ends = counts.cumsum().reshape(-1, groups)
        counts = counts.reshape(-1, groups)
        chosen = random_split(names.tolist(), self.fractions, self.split_seed)
        place = {name: index for index, name in enumerate(names.tolist())}
        users = {split: sorted(place[name] for name in some) for split, some in chosen.items()}
        if empty := [split for split, some in users.items() if not some]:
            raise UserError(
                f"dataset.fractions={list(self.fractions)} leaves no user for {empty[0]}; "
                f"{self.path} has {len(names)}"
            )
        shift, scale = np.zeros(x.shape[1]), np.ones(x.shape[1])
        if self.standardise:
            own = x[np.isin(user, users["train"])]
            std = own.std(0)
            shift, scale = own.mean(0), 1 / np.where(std > 0, std, 1)
        digest = hashlib.sha256(
            x.tobytes() + y.tobytes() + repr((names.tolist(), features)).encode()
        )
        target = torch.from_numpy(y) if classes else torch.from_numpy(y).float()[:, None]
        return UserData(
            torch.from_numpy((x - shift) * scale).float().to(device), target.to(device),
            {split: (torch.tensor((ends - counts)[some]).to(device),
                     torch.tensor(counts[some]).to(device)) for split, some in users.items()},
            chosen, classes, digest.hexdigest()[:16],
            {"shift": shift.tolist(), "scale": scale.tolist()},
        )  # fmt: skip

    def _targets(self, path: Path, cells: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Return the targets [I], and the names of the classes; [] for values."""
        return _numbers(path, self.value, cells), []


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserClasses(UserValues):
    """As `UserValues`, but what is predicted is a class that means the same for all users."""

    target: ClassVar[str] = "class"

    def _targets(self, path: Path, cells: np.ndarray) -> tuple[np.ndarray, list[str]]:
        names, y = np.unique(cells, return_inverse=True)
        if len(names) < 2:
            raise UserError(f"dataset.value={self.value}: {path} has only one class")
        return y.astype(np.int64), names.tolist()


def _numbers(path: Path, name: str, cells: np.ndarray) -> np.ndarray:
    """Return a column as float64; raise UserError for a cell that is no finite number."""
    for number, cell in enumerate(cells, 2):
        try:
            is_number = np.isfinite(float(cell))
        except ValueError:
            is_number = False
        if not is_number:
            raise UserError(
                f"{path}: row {number} of column {name} is {str(cell)!r}, not a number; give the "
                "columns of numbers as dataset.features"
            )
    return cells.astype(np.float64)


@dataclasses.dataclass(eq=False, repr=False)
class UserData(OpenDataset):
    """The opened table; users take the place of classes in its splits."""

    x: Tensor  # [I, D]
    y: Tensor  # [I] or [I, 1]
    rows: dict[str, tuple[Tensor, Tensor]]  # first row and number of rows of each group [U, G]
    users: dict[str, list[str]]
    classes: list[str]
    content_hash: str
    standardisation: dict[str, list[float]] = dataclasses.field()

    def __post_init__(self) -> None:
        self.inputs = InputSpec(tuple(self.x.shape[1:]))
        self.outputs = len(self.classes) or 1

    def num_classes(self, split: str) -> int:
        return len(self.classes)

    def protocol(self, split: str) -> dict[str, object]:
        digest = hashlib.sha256(repr(self.users[split]).encode()).hexdigest()[:16]
        own = {"data": self.content_hash, "users": digest, "num_users": len(self.users[split])}
        return own | ({"classes": self.classes} if self.classes else {})

    def episodes(
        self, split: str, shape: Shape, seed: int, augment: Augmentation | None = None
    ) -> "UserEpisodes":
        """Return the tasks of a split: users with enough rows, each as often as any other."""
        if shape.unlabelled or shape.distractors or shape.copies or augment is not None:
            raise UserError(
                f"{split} episodes: tasks of users have no unlabelled examples and no "
                "augmentation; leave them out"
            )
        if shape.way != self.outputs:
            raise UserError(
                f"{split} episodes: {shape.where}.way={shape.way}; should be {self.outputs}, "
                + ("the number of classes" if self.classes else "as a value is predicted")
            )
        starts, counts = self.rows[split]
        required = shape.shot + shape.query
        is_enough = (counts >= required).all(1)
        each = " of each class" if self.classes else ""
        if not is_enough.any():
            raise UserError(
                f"{split} episodes: shot + query = {required}, but no user has so many rows{each}; "
                f"lower {shape.where}.shot or {shape.where}.query"
            )
        if left_out := int((~is_enough).sum()):
            logging.getLogger(__name__).warning(
                f"{split}: {left_out} of {len(counts)} users have fewer than {required} "
                f"rows{each}, and are left out"
            )
        return UserEpisodes(
            self, starts[is_enough], counts[is_enough], int(counts[is_enough].max()), shape,
            prng.key_of(seed, STREAMS[split], device=starts.device),
        )  # fmt: skip

    def batches(
        self, split: str, size: int, seed: int, augment: Augmentation | None = None
    ) -> "UserBatches":
        starts, counts = (part.flatten() for part in self.rows[split])
        first = torch.repeat_interleave(starts - (counts.cumsum(0) - counts), counts)
        rows = first + torch.arange(len(first), device=first.device)
        return UserBatches(self, rows, size, prng.key_of(seed, STREAMS[split], device=rows.device))


@dataclasses.dataclass(frozen=True)
class UserEpisodes(TaskSource):
    """Tasks of one user each; all have the same numbers of rows, however many a user has."""

    data: UserData
    starts: Tensor  # first row of each group, int64 [U, G]
    counts: Tensor  # number of rows of each, int64 [U, G], each at least shot + query
    largest: int  # the largest of them
    shape: Shape
    key: Tensor

    def draw(self, first: int | Tensor, count: int) -> Task:
        key_T = numbered_keys(self.key, first, count)
        user_T = prng.integers(prng.fold_in(key_T, 0), (1,), len(self.starts))[:, 0]
        starts_TG, counts_TG = self.starts[user_T], self.counts[user_T]
        groups = torch.arange(self.starts.shape[1], device=key_T.device)
        key_TG = prng.fold_in(prng.fold_in(key_T, 1).unsqueeze(-1), groups)
        places = torch.arange(self.largest, device=key_T.device)
        shot, query = self.shape.shot, self.shape.query
        picks = prng.smallest(key_TG, places >= counts_TG[..., None], shot + query)
        parts = (starts_TG[..., None] + picks).split([shot, query], -1)
        (x, y), (query_x, query_y) = (
            self._shuffled(rows, prng.fold_in(key_T, 2 + number))
            for number, rows in enumerate(parts)
        )
        return Task(Support(x, y, self.shape.way), Query(query_x, query_y), prng.fold_in(key_T, 4))

    def _shuffled(self, rows_TGK: Tensor, key_T: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and targets in random order, so that positions reveal no class."""
        rows = rows_TGK.flatten(1)
        rows = rows.gather(1, prng.permutation(key_T, rows.shape[1]))
        return self.data.x[rows], self.data.y[rows]


@dataclasses.dataclass(frozen=True)
class UserBatches(BatchSource):
    """Batches of `size` of the rows, int64 [R]."""

    data: UserData
    rows: Tensor
    size: int
    key: Tensor

    def draw(self, first: int | Tensor, count: int) -> Batch:
        key_T = numbered_keys(self.key, first, count)
        rows = self.rows[prng.integers(prng.fold_in(key_T, 0), (self.size,), len(self.rows))]
        return Batch(self.data.x[rows], self.data.y[rows], prng.fold_in(key_T, 1))
