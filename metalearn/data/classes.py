"""An opened dataset with classes, of any kind of input."""

import copy
import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.sampling import STREAMS, BatchSampler, EpisodeSampler, Shape
from metalearn.tasks.store import (
    Augmentation,
    Augmented,
    ClassIndex,
    ClassView,
    ImageStore,
    MixedClasses,
    Store,
)

_SPLITS = ("train", "val", "test")


class ClassData:
    """An opened dataset with classes: an input store and a view of the classes of each split.

    Attributes:
        stores: The inputs of each split.
        views: The classes of each split.
        content_hash: Hash of the data.
        standardisation: Shift and scale of each channel; {} without standardisation.
        hashes: Hash of the content of each input, int64 [I] on the CPU, the same in all datasets;
            None if unknown.
        is_on_host: Whether inputs stay on the host, and tasks are drawn there.
        inputs: Kind and shape of one input.
    """

    outputs: int | None = None

    def __init__(
        self,
        stores: Mapping[str, Store],
        views: dict[str, ClassView],
        content_hash: str,
        standardisation: dict[str, list[float]] = {},  # noqa: B006
        hashes: torch.Tensor | None = None,
        is_on_host: bool = False,
    ) -> None:
        self.stores, self.views, self.content_hash = dict(stores), views, content_hash
        self.standardisation, self.hashes = standardisation, hashes
        self.is_on_host = is_on_host
        self.inputs = stores["train"].spec

    def class_names(self, split: str) -> tuple[str, ...]:
        """Return the names of the classes of a split."""
        return self.views[split].index.names

    def num_classes(self, split: str) -> int:
        """Return the number of classes of a classifier over a split, rotated classes included."""
        return self.views[split].num_classes

    def protocol(self, split: str) -> dict[str, object]:
        """Return the hashes of data and classes, the number of classes, and the rotations."""
        others = [
            view.index.names
            for name, view in self.views.items()
            if name in _SPLITS and split not in (name, "all")
        ]
        return {
            "data": self.content_hash,
            "classes": hashlib.sha256(repr(self.class_names(split)).encode()).hexdigest()[:16],
            # The classes of the other splits: those available for training and validation.
            "split": hashlib.sha256(repr(others).encode()).hexdigest()[:16],
            "num_classes": self.num_classes(split),
            **self.views[split].protocol,
        }

    def with_split(self, split: str) -> "ClassData":
        """Return the data with one more split.

        Args:
            split: "all", the classes of all splits by name; or "train+test", in whose episodes
                classes of both meet (see `MixedClasses`).

        Raises:
            UserError: If the splits do not share one store of inputs, or the classes to mix are
                rotated.
        """
        views = [self.views[name] for name in (_SPLITS if split == "all" else split.split("+"))]
        parts = [view.index for view in views]
        last = torch.arange(max(part.rows.shape[1] for part in parts))
        columns = [part.rows[:, last.clamp_max(part.rows.shape[1] - 1)] for part in parts]
        rows, counts = torch.cat(columns), torch.cat([part.counts for part in parts])
        names = [name for part in parts for name in part.names]
        if len(rows.unique()) < counts.sum():  # each split counts its rows from 0
            raise UserError(
                f"split={split}: the splits of this dataset are stored apart; use split=test"
            )
        test = self.views["test"]
        if split == "all":
            order = sorted(range(len(names)), key=names.__getitem__)
            index = ClassIndex(rows[order], counts[order], tuple(names[place] for place in order))
            view = dataclasses.replace(test, index=index)
        elif test.has_rotations:
            raise UserError(f"split={split}: requires dataset.rotations=none, or train_classes")
        else:
            index = ClassIndex(rows, counts, tuple(names))
            view = MixedClasses(index, num_base=len(parts[0].names))
        return self._with(
            stores={**self.stores, split: self.stores["test"]}, views={**self.views, split: view}
        )

    def standardised(self, standardisation: dict[str, list[float]]) -> "ClassData":
        """Return the data with images that are normalised by the given shift and scale."""
        stores: dict[str, Store] = {}
        for split, store in self.stores.items():
            if isinstance(store, ImageStore) and standardisation:
                device = store.shift.device
                shift, scale = (
                    torch.tensor(standardisation[name], device=device).view(-1, 1, 1)
                    for name in ("shift", "scale")
                )
                store = dataclasses.replace(store, shift=shift, scale=scale)
            stores[split] = store
        return self._with(stores=stores, standardisation=standardisation)

    def _with(self, **changes: Any) -> "ClassData":
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def class_hashes(self, split: str) -> dict[str, torch.Tensor]:
        """Return the hashes of the inputs of each class of a split, by name; {} if unknown."""
        index = self.views[split].index
        if self.hashes is None:
            return {}
        return {
            name: self.hashes[rows[:count]]
            for name, rows, count in zip(
                index.names, index.rows.cpu(), index.counts.tolist(), strict=True
            )
        }

    def episodes(
        self, split: str, shape: Shape, seed: int, augment: Augmentation | None = None
    ) -> EpisodeSampler:
        """Return a sampler of the episodes of a split."""
        try:
            changed = self._store(split, augment)
            store, support = (self.stores[split], changed) if shape.copies else (changed, None)
            return EpisodeSampler(store, self.views[split], shape, self._key(split, seed), support)
        except UserError as error:
            raise UserError(f"{split} episodes: {error}") from None

    def batches(
        self, split: str, size: int, seed: int, augment: Augmentation | None = None
    ) -> BatchSampler:
        """Return a sampler of batches of a split."""
        return BatchSampler(
            self._store(split, augment), self.views[split], size, self._key(split, seed)
        )

    def _store(self, split: str, augment: Augmentation | None) -> Store:
        return self.stores[split] if augment is None else Augmented(self.stores[split], augment)

    def _key(self, split: str, seed: int) -> torch.Tensor:
        return prng.key_of(seed, STREAMS[split], device=self.views[split].index.rows.device)
