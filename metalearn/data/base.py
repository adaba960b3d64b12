"""The contract of a dataset: settings that open it, and the interface of an opened dataset."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from metalearn.config.fields import note
from metalearn.tasks.family import TaskFamily, supervised
from metalearn.tasks.sampling import BatchSource, Shape, TaskSource
from metalearn.tasks.store import Augmentation
from metalearn.tasks.types import InputSpec


class OpenDataset:
    """An opened dataset; the base is one without classes, `ClassData` one with them."""

    inputs: InputSpec  # kind and shape of one input
    outputs: int | None = None  # number of outputs of a task; None for its number of ways
    content_hash: str  # hash of the data, independent of the files they came from
    #: Shift and scale of each channel; {} without standardisation.
    standardisation: dict[str, list[float]] = {}  # noqa: RUF012

    def class_names(self, split: str) -> tuple[str, ...]:
        """Return the names of the classes of a split."""
        return ()

    def num_classes(self, split: str) -> int:
        """Return the number of classes of a classifier over a split; 0 for regression."""
        return 0

    def protocol(self, split: str) -> dict[str, object]:
        """Return the properties of the data that results on this split depend on, as plain data."""
        return {"data": self.content_hash}

    def episodes(
        self, split: str, shape: Shape, seed: int, augment: Augmentation | None = None
    ) -> TaskSource:
        """Return the tasks of a split; raise UserError if it is too small for this shape.

        Args:
            split: "train", "val" or "test".
            shape: Numbers of classes and examples of an episode.
            seed: Seed of the tasks.
            augment: Random change of inputs, in training; or with `shape.copies` of the copies of
                the support set.
        """
        raise NotImplementedError

    def batches(
        self, split: str, size: int, seed: int, augment: Augmentation | None = None
    ) -> BatchSource:
        """Return batches of `size` examples of a split, with labels over all its classes."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """The settings of a dataset, in `metalearn.data` or a plugin, with YAML in `conf/dataset/`."""

    #: Kind of its tasks: "class", "value", or one that a task family defines.
    target: ClassVar[str] = "class"
    #: True if `to_array` exists: it converts an image (PIL) to uint8 [C, H, W].
    reads_image_files: ClassVar[bool] = False

    source: str = note()
    licence: str = note()
    by_hand: str = note()

    @property
    def addresses(self) -> list[str]:
        """Return the addresses of the files that `open` downloads if they are absent."""
        return []

    def files(self, data_dir: Path) -> list[Path]:
        """Return the files or folders to read; [] for a dataset that needs none."""
        return []

    def is_present(self, data_dir: Path) -> bool:
        """Return True if `open` needs no download and no other files."""
        return all(path.exists() for path in self.files(data_dir))

    def open(self, data_dir: Path, cache_dir: Path, device: torch.device) -> OpenDataset:
        """Read the data onto the device; raise UserError for missing or corrupt data.

        Args:
            data_dir: Folder of the files, and of downloads.
            cache_dir: Folder of the cache of decoded data.
            device: Device that holds the inputs.
        """
        raise NotImplementedError

    def family(
        self, loss: str | None, inner_loss: str | None, settings: Mapping[str, Any]
    ) -> TaskFamily:
        """Return how to learn from its tasks and score them; arguments as in `supervised`."""
        return supervised(self.target, loss, inner_loss, settings)
