"""The contract of a dataset: settings that open it, and what an opened dataset hands out."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from metalearn.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.family import TaskFamily, supervised
from metalearn.tasks.sampling import (
    STREAMS,
    BatchSampler,
    BatchSource,
    EpisodeSampler,
    Shape,
    TaskSource,
)
from metalearn.tasks.store import Augmentation, Augmented, ClassView, Store
from metalearn.tasks.types import InputSpec


class OpenDataset(Protocol):
    """An opened dataset; `ClassData` is one for everything that has classes.

    inputs: what one input is; outputs: number of outputs a task needs, None: its number of ways; content_hash: identifies the
    data, whatever files they came from; standardisation: shift and scale of each channel, {} where there is none.
    """

    @property
    def inputs(self) -> InputSpec: ...

    @property
    def outputs(self) -> int | None: ...

    @property
    def content_hash(self) -> str: ...

    @property
    def standardisation(self) -> dict[str, list[float]]: ...

    def class_names(self, split: str) -> tuple[str, ...]:
        """Return the names of the classes of a split; () for regression."""

    def num_classes(self, split: str) -> int:
        """Return the number of classes of a classifier over a split; 0 for regression."""

    def protocol(self, split: str) -> dict[str, object]:
        """Return what of the data a measurement on this split depends on, as plain data."""

    def episodes(
        self, split: str, shape: Shape, seed: int, augment: Augmentation | None = None
    ) -> TaskSource:
        """Return the tasks of a split. augment: changes inputs at random, in training. Raises UserError."""

    def batches(
        self, split: str, size: int, seed: int, augment: Augmentation | None = None
    ) -> BatchSource:
        """Return ordinary batches of `size` examples of a split, with labels over all its classes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """The settings of a dataset; a dataclass in `metalearn.data` or a plugin, with a YAML file in `conf/dataset/`."""

    #: Kind of its tasks: "class", "value", or a family's own.
    target: ClassVar[str] = "class"

    def files(self, data_dir: Path) -> list[Path]:
        """Return the files or folders that are read; [] for a dataset that needs none."""
        return []

    def open(self, data_dir: Path, cache_dir: Path, device: torch.device) -> OpenDataset:
        """Read the data onto the device.

        Args:
            data_dir: where files are, or are downloaded to.
            cache_dir: for what is decoded once.
            device: where the inputs are kept.

        Raises:
            UserError: for data that are missing or damaged.
        """
        raise NotImplementedError

    def family(
        self, loss: str | None, inner_loss: str | None, settings: Mapping[str, Any]
    ) -> TaskFamily:
        """Return how its tasks are learned from and scored; arguments as in `supervised`."""
        return supervised(self.target, loss, inner_loss, settings)


class ClassData:
    """Inputs with classes, whatever they are: the store and the view on the classes of each split."""

    outputs: int | None = None

    def __init__(
        self,
        stores: Mapping[str, Store],
        views: dict[str, ClassView],
        content_hash: str,
        standardisation: dict[str, list[float]] = {},  # noqa: B006
    ) -> None:
        self.stores, self.views, self.content_hash = dict(stores), views, content_hash
        self.standardisation = standardisation
        self.inputs = stores["train"].spec

    def class_names(self, split: str) -> tuple[str, ...]:
        return self.views[split].index.names

    def num_classes(self, split: str) -> int:
        return self.views[split].num_classes

    def protocol(self, split: str) -> dict[str, object]:
        others = [view.index.names for name, view in self.views.items() if name != split]
        return {
            "data": self.content_hash,
            "classes": hashlib.sha256(repr(self.class_names(split)).encode()).hexdigest()[:16],
            "split": hashlib.sha256(repr(others).encode()).hexdigest()[
                :16
            ],  # what was left to train and validate on
            "num_classes": self.num_classes(split),
            **self.views[split].protocol,
        }

    def episodes(
        self, split: str, shape: Shape, seed: int, augment: Augmentation | None = None
    ) -> EpisodeSampler:
        try:
            return EpisodeSampler(
                self._store(split, augment), self.views[split], shape, self._key(split, seed)
            )
        except UserError as error:
            raise UserError(f"{split} episodes: {error}") from None

    def batches(
        self, split: str, size: int, seed: int, augment: Augmentation | None = None
    ) -> BatchSampler:
        return BatchSampler(
            self._store(split, augment), self.views[split], size, self._key(split, seed)
        )

    def _store(self, split: str, augment: Augmentation | None) -> Store:
        return self.stores[split] if augment is None else Augmented(self.stores[split], augment)

    def _key(self, split: str, seed: int) -> torch.Tensor:
        return prng.key_of(seed, STREAMS[split], device=self.views[split].index.rows.device)
