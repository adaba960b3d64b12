"""Store all inputs of a dataset as one tensor, and index them by class.

Images are on the device or, if they are too large for it, on the host. Then row numbers are also on
the host, and the inputs of a task are copied to the device when they are loaded.

Legend: I inputs, C classes, M inputs of the largest class, T tasks, B inputs per task or batch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from metalearn.tasks import prng
from metalearn.tasks.choosing import Chooser, chooser
from metalearn.tasks.types import InputSpec


def transferred(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; copies to a GPU go through pinned memory and do not wait."""
    if x.device == device:
        return x
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


class Store:
    """All inputs of a dataset, addressed by row number. A store has `spec`, `len` and `load`."""

    @property
    def spec(self) -> InputSpec:
        """Return the shape of one input, and the vocabulary size for tokens."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def load(self, rows: Tensor) -> Tensor:
        """Return inputs [*rows, *X] before normalisation, as augmentations see them."""
        raise NotImplementedError

    def normalise(self, x: Tensor) -> Tensor:
        """Normalise loaded inputs for the network."""
        return x

    def gather(self, rows: Tensor, key: Tensor) -> Tensor:
        """Return normalised inputs [T, B, *X] of rows [T, B]; key [T], for augmentations."""
        return self.normalise(self.load(rows))


@dataclasses.dataclass(frozen=True)
class ArrayStore(Store):
    """Feature vectors, float32 [I, *X], or tokens, int64 [I, L], 0 for padding."""

    values: Tensor
    vocabulary: int | None = None

    @property
    def spec(self) -> InputSpec:
        return InputSpec(tuple(self.values.shape[1:]), self.vocabulary)

    def __len__(self) -> int:
        return len(self.values)

    def load(self, rows: Tensor) -> Tensor:
        return self.values[rows]


@dataclasses.dataclass(frozen=True)
class ImageStore(Store):
    """Images uint8 [I, C, H, W] and their normalisation, (x / 255 - shift) * scale.

    Shift and scale, float32 [C, 1, 1], are on the device; images are there or on the host. With
    `has_rotations`, rows I r to I r + I - 1 are the images rotated by 90 r degrees, r = 1, 2, 3.
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
        """Return images in [0, 1], float32 [*rows, C, H, W], on the device."""
        device = self.shift.device
        if not self.has_rotations:
            return transferred(self.images[rows], device).to(torch.float32) / 255
        x = transferred(self.images[rows % len(self)], device)
        rotations = transferred(rows // len(self), device)[..., None, None, None]
        x = torch.where(rotations >= 2, x.flip((-2, -1)), x)
        x = torch.where(rotations % 2 == 1, x.rot90(1, (-2, -1)), x)
        return x.to(torch.float32) / 255

    def normalise(self, x: Tensor) -> Tensor:
        return (x - self.shift) * self.scale


#: (x [B, *X], key int64 [B]) -> x [B, *X]; a function of x and key alone.
Augmentation = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Augmented(Store):
    """A store that augments its inputs at random, for training; `load` does not."""

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
        x = self.load(rows).flatten(0, 1)
        x = self.augment(x, transferred(key_TB.flatten(), x.device))
        return self.normalise(x.unflatten(0, rows.shape))


@dataclasses.dataclass(frozen=True)
class ClassIndex:
    """The classes of one split."""

    rows: Tensor  # row numbers of each class's inputs, int64 [C, M], padded
    counts: Tensor  # number of inputs of each class, int64 [C]
    names: tuple[str, ...]  # name of each class
    superclasses: tuple[str, ...] = ()  # name of each class's superclass; () if there are none
    #: Name of the part of the data that no episode with this class leaves; () for one.
    parts: tuple[str, ...] = ()

    @functools.cached_property
    def num_inputs(self) -> int:
        """Return the number of inputs of all classes."""
        return int(self.counts.sum())

    @functools.cached_property
    def smallest(self) -> tuple[str, int]:
        """Return the name of the class with the fewest inputs, and their number."""
        number = int(self.counts.argmin())
        return self.names[number], int(self.counts[number])


@dataclasses.dataclass(frozen=True)
class ClassView:
    """Use the classes of an index in tasks without rotation.

    `rotations` says what is rotated, for the protocol; `chooser` chooses the classes of episodes.
    """

    rotations: ClassVar[str] = "none"

    index: ClassIndex
    chooser: Chooser = dataclasses.field(default=Chooser(), kw_only=True)

    def sampled(self, sampler: str) -> "ClassView":
        """Return the view with the classes of episodes chosen by a sampler; see `chooser`."""
        index = self.index
        own = chooser(sampler, index.superclasses, index.parts, index.rows)
        return dataclasses.replace(self, chooser=own)

    @property
    def has_rotations(self) -> bool:
        """Return True if inputs may be rotated."""
        return self.rotations != "none"

    @property
    def num_classes(self) -> int:
        """Return the number of outputs of a classifier over all classes."""
        return len(self.index.rows)

    @property
    def protocol(self) -> dict[str, object]:
        """Return the settings that affect a measurement, apart from the classes, as plain data."""
        others = {"rotations_may_meet": None, "rotations_share_drawings": None}
        return {"rotations": self.rotations, **others}

    @property
    def max_way(self) -> int:
        """Return the largest possible number of classes in one episode."""
        return self.chooser.max_way(len(self.index.rows))

    def choose(self, key: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        """Draw the classes of episodes with keys int64 [T]: int64 [T, count].

        Also return rotations in units of 90 degrees, int64 [T, count] or None.
        """
        return self.chooser.choose(key, len(self.index.rows), 1, count), None

    def image_ids(self, classes: Tensor, rotations: Tensor | None) -> Tensor:
        """Return the ids that seed the draw of inputs; equal ids draw the same images."""
        return classes

    def rotate(self, key: Tensor, classes: Tensor, count: int) -> tuple[Tensor | None, Tensor]:
        """Draw random rotations of single inputs of these classes, both int64 [T, count], or None.

        Also return the labels, of the same shape.
        """
        return None, classes


@dataclasses.dataclass(frozen=True)
class MixedClasses(ClassView):
    """Draw half of the classes of an episode, rounded down, from the first ones of the index.

    `num_base` is the number of these base classes; the others are novel.
    """

    num_base: int

    @property
    def protocol(self) -> dict[str, object]:
        return super().protocol | {"base_classes": self.num_base}

    @property
    def max_way(self) -> int:
        return min(2 * self.num_base + 1, 2 * (self.num_classes - self.num_base))

    def choose(self, key: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        key_T = prng.fold_in(key, 0)
        num_novel = self.num_classes - self.num_base
        base = prng.choice(prng.fold_in(key_T, 0), self.num_base, count // 2)
        novel = prng.choice(prng.fold_in(key_T, 1), num_novel, count - count // 2) + self.num_base
        order = prng.permutation(prng.fold_in(key_T, 2), count)
        return torch.cat([base, novel], -1).gather(-1, order), None


@dataclasses.dataclass(frozen=True)
class RotatedEpisodes(ClassView):
    """Rotate each class of each episode at random, without changing its label."""

    rotations: ClassVar[str] = "episode"

    def choose(self, key: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        classes, _ = super().choose(key, count)
        return classes, prng.integers(prng.fold_in(key, 1), (count,), 4)

    def rotate(self, key: Tensor, classes: Tensor, count: int) -> tuple[Tensor | None, Tensor]:
        return prng.integers(prng.fold_in(key, 1), (count,), 4), classes


@dataclasses.dataclass(frozen=True)
class RotatedClasses(RotatedEpisodes):
    """Split each class into four, one per rotation by 0, 90, 180 and 270 degrees.

    Two rotations of one class may be in the same episode if they `may_meet`, and then use the same
    images if they `share_drawings`, so that no image is in the support set of one and in the query
    set of the other.
    """

    rotations: ClassVar[str] = "classes"

    may_meet: bool
    share_drawings: bool

    @property
    def protocol(self) -> dict[str, object]:
        share_drawings = self.share_drawings if self.may_meet else None
        return super().protocol | {
            "rotations_may_meet": self.may_meet, "rotations_share_drawings": share_drawings
        }  # fmt: skip

    @property
    def num_classes(self) -> int:
        return 4 * len(self.index.rows)

    @property
    def max_way(self) -> int:
        return super().max_way * (4 if self.may_meet else 1)

    def choose(self, key: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        if not self.may_meet:
            return super().choose(key, count)
        chosen = self.chooser.choose(key, len(self.index.rows), 4, count)
        return chosen % len(self.index.rows), chosen // len(self.index.rows)

    def image_ids(self, classes: Tensor, rotations: Tensor | None) -> Tensor:
        if self.share_drawings or rotations is None:
            return classes
        return classes + len(self.index.rows) * rotations

    def rotate(self, key: Tensor, classes: Tensor, count: int) -> tuple[Tensor | None, Tensor]:
        rotations = prng.integers(prng.fold_in(key, 1), (count,), 4)
        return rotations, classes + rotations * len(self.index.rows)
