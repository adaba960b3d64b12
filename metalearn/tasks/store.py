"""Where inputs come from: all inputs of a dataset as one tensor on the device, and which of them belong to which class.

Legend: I inputs, C classes, M inputs of the largest class, T tasks, B inputs at a time.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from metalearn.tasks import prng
from metalearn.tasks.types import InputSpec


class Store(Protocol):
    """All inputs of a dataset. An input is known by its row number."""

    @property
    def spec(self) -> InputSpec:
        """Return the shape of one input, and the size of the vocabulary for tokens."""

    def __len__(self) -> int:
        """Return the number of inputs."""

    def load(self, rows: Tensor) -> Tensor:
        """Return the inputs of these rows before normalisation, as augmentations see them: [*rows, *X]."""

    def normalise(self, x: Tensor) -> Tensor:
        """Return loaded inputs as the network sees them."""

    def gather(self, rows: Tensor, key: Tensor) -> Tensor:
        """Return the inputs of rows [T, B] as the network sees them: [T, B, *X].

        Args:
            rows: int64 [T, B].
            key: int64 [T], for stores that augment their inputs at random.
        """


@dataclasses.dataclass(frozen=True)
class ArrayStore:
    """Feature vectors or token sequences.

    values: float32 [I, *X]; or int64 [I, L] where there is a vocabulary, 0 for padding.
    """

    values: Tensor
    vocabulary: int | None = None

    @property
    def spec(self) -> InputSpec:
        return InputSpec(tuple(self.values.shape[1:]), self.vocabulary)

    def __len__(self) -> int:
        return len(self.values)

    def load(self, rows: Tensor) -> Tensor:
        return self.values[rows]

    def normalise(self, x: Tensor) -> Tensor:
        return x

    def gather(self, rows: Tensor, key: Tensor) -> Tensor:
        return self.load(rows)


@dataclasses.dataclass(frozen=True)
class ImageStore:
    """Images uint8 [I, C, H, W]; shift and scale float32 [C, 1, 1] are applied to x / 255.

    has_rotations: rows I r to I r + I - 1 are the images rotated by r times 90 degrees, r = 1, 2, 3.
    """

    images: Tensor
    shift: Tensor
    scale: Tensor
    has_rotations: bool = False

    @property
    def spec(self) -> InputSpec:
        return InputSpec(tuple(self.images.shape[1:]))

    def __len__(self) -> int:
        return len(self.images)

    def load(self, rows: Tensor) -> Tensor:
        """Return images in [0, 1], float32 [*rows, C, H, W]."""
        if not self.has_rotations:
            return self.images[rows].to(torch.float32) / 255
        x = self.images[rows % len(self)]
        rotations = (rows // len(self))[..., None, None, None]
        x = torch.where(rotations >= 2, x.flip((-2, -1)), x)
        x = torch.where(rotations % 2 == 1, x.rot90(1, (-2, -1)), x)
        return x.to(torch.float32) / 255

    def normalise(self, x: Tensor) -> Tensor:
        return (x - self.shift) * self.scale

    def gather(self, rows: Tensor, key: Tensor) -> Tensor:
        return self.normalise(self.load(rows))


#: (x [B, *X], key int64 [B]) -> x [B, *X]: the same key gives the same change.
Augmentation = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Augmented:
    """A store whose inputs are changed at random each time, for training."""

    store: Store
    augment: Augmentation

    @property
    def spec(self) -> InputSpec:
        return self.store.spec

    def __len__(self) -> int:
        return len(self.store)

    def load(self, rows: Tensor) -> Tensor:
        return self.store.load(rows)

    def normalise(self, x: Tensor) -> Tensor:
        return self.store.normalise(x)

    def gather(self, rows: Tensor, key: Tensor) -> Tensor:
        key_TB = prng.fold_in(key[:, None], torch.arange(rows.shape[1], device=rows.device))
        x = self.augment(self.store.load(rows).flatten(0, 1), key_TB.flatten())
        return self.store.normalise(x.unflatten(0, rows.shape))


@dataclasses.dataclass(frozen=True)
class ClassIndex:
    """The classes of one split. rows: int64 [C, M], padded; counts: int64 [C]; names: of each class."""

    rows: Tensor
    counts: Tensor
    names: tuple[str, ...]

    @functools.cached_property
    def num_inputs(self) -> int:
        """Number of inputs of all classes."""
        return int(self.counts.sum())


@dataclasses.dataclass(frozen=True)
class ClassView:
    """How the classes of an index take part in tasks: as they are. has_rotations: whether inputs may be rotated."""

    has_rotations: ClassVar[bool] = False

    index: ClassIndex

    @property
    def num_classes(self) -> int:
        """Number of classes of a classifier over all of them."""
        return len(self.index.rows)

    @property
    def protocol(self) -> dict[str, object]:
        """What a measurement depends on besides the classes, as plain data."""
        return {"rotations": "none", "rotations_may_meet": None, "rotations_share_drawings": None}

    @property
    def max_way(self) -> int:
        """Number of classes that can meet in one episode."""
        return len(self.index.rows)

    def choose(self, key: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        """Draw the classes of episodes.

        Args:
            key: int64 [T].
            count: number of classes of each episode.

        Returns:
            Their places in the index, int64 [T, count], and their rotations, int64 [T, count] or None.
        """
        return prng.choice(prng.fold_in(key, 0), len(self.index.rows), count), None

    def drawing_ids(self, classes: Tensor, rotations: Tensor | None) -> Tensor:
        """Return what the draw of a class's inputs depends on, alike for classes that must share their drawings."""
        return classes

    def rotate(self, key: Tensor, classes: Tensor, count: int) -> tuple[Tensor | None, Tensor]:
        """Return random rotations of single inputs, and their labels. key: int64 [T]; classes: int64 [T, count]."""
        return None, classes


@dataclasses.dataclass(frozen=True)
class RotatedClasses(ClassView):
    """Each class stands for four, one for each rotation by 90 degrees.

    may_meet: whether two rotations of one class may meet in an episode; share_drawings: whether they then show the same
    drawings, so that no drawing is in the support set of one and in the query set of the other.
    """

    has_rotations: ClassVar[bool] = True

    may_meet: bool
    share_drawings: bool

    @property
    def protocol(self) -> dict[str, object]:
        return {
            "rotations": "classes",
            "rotations_may_meet": self.may_meet,
            "rotations_share_drawings": self.share_drawings if self.may_meet else None,
        }

    @property
    def num_classes(self) -> int:
        return 4 * len(self.index.rows)

    @property
    def max_way(self) -> int:
        return self.num_classes if self.may_meet else len(self.index.rows)

    def choose(self, key: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        size = len(self.index.rows)
        if self.may_meet:
            chosen = prng.choice(prng.fold_in(key, 0), 4 * size, count)
            return chosen % size, chosen // size
        classes = prng.choice(prng.fold_in(key, 0), size, count)
        return classes, prng.integers(prng.fold_in(key, 1), (count,), 4)

    def drawing_ids(self, classes: Tensor, rotations: Tensor | None) -> Tensor:
        if self.share_drawings or rotations is None:
            return classes
        return classes + len(self.index.rows) * rotations

    def rotate(self, key: Tensor, classes: Tensor, count: int) -> tuple[Tensor | None, Tensor]:
        rotations = prng.integers(prng.fold_in(key, 1), (count,), 4)
        return rotations, classes + rotations * len(self.index.rows)


@dataclasses.dataclass(frozen=True)
class RotatedEpisodes(ClassView):
    """Each class of each episode is rotated at random; its label does not change."""

    has_rotations: ClassVar[bool] = True

    @property
    def protocol(self) -> dict[str, object]:
        return {
            "rotations": "episode",
            "rotations_may_meet": None,
            "rotations_share_drawings": None,
        }

    def choose(self, key: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        classes, _ = super().choose(key, count)
        return classes, prng.integers(prng.fold_in(key, 1), (count,), 4)

    def rotate(self, key: Tensor, classes: Tensor, count: int) -> tuple[Tensor | None, Tensor]:
        return prng.integers(prng.fold_in(key, 1), (count,), 4), classes
