"""An opened dataset with classes, of any kind of input."""

import copy
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from metalearn.data.base import OpenDataset
from metalearn.system.errors import UserError, prefixed
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


def joined(
    indices: Sequence[ClassIndex], offsets: Sequence[int] | None = None, is_sorted: bool = True
) -> ClassIndex:
    """Return the classes of several indices, with offsets added to their rows, perhaps by name."""
    last = torch.arange(max(one.rows.shape[1] for one in indices))
    rows = [
        one.rows[:, last.clamp_max(one.rows.shape[1] - 1)] + offset
        for one, offset in zip(indices, offsets or [0] * len(indices), strict=True)
    ]
    names = [name for one in indices for name in one.names]
    places = range(len(names))
    order = sorted(places, key=names.__getitem__) if is_sorted else list(places)

    def ordered(field: str) -> tuple[str, ...]:
        values = [value for one in indices for value in getattr(one, field)]
        return tuple(values[place] for place in order) if values else ()

    return ClassIndex(
        torch.cat(rows)[order],
        torch.cat([one.counts for one in indices])[order],
        **{field: ordered(field) for field in ("names", "superclasses", "parts")},
    )


@dataclasses.dataclass(eq=False, repr=False)
class ClassData(OpenDataset):
    """An opened dataset with classes: a store of inputs and a view of the classes of each split."""

    stores: Mapping[str, Store]
    views: dict[str, ClassView]
    content_hash: str
    standardisation: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    #: Hash of the content of each input, int64 [I] on the CPU, the same in all datasets; None if
    #: unknown.
    hashes: torch.Tensor | None = None
    is_on_host: bool = False  # whether inputs stay on the host, and tasks are drawn there

    def __post_init__(self) -> None:
        self.inputs = self.stores["train"].spec

    def class_names(self, split: str) -> tuple[str, ...]:
        return self.views[split].index.names

    def num_classes(self, split: str) -> int:
        """Return the number of classes of a classifier over a split, rotated classes included."""
        return self.views[split].num_classes

    def protocol(self, split: str) -> dict[str, object]:
        own = {name: view.index.names for name, view in self.views.items() if name in _SPLITS}
        others = [names for name, names in own.items() if split not in (name, "all")]
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

        "all" has the classes of all splits by name; in episodes of "train+test", classes of both
        meet (see `MixedClasses`). Raise UserError if the splits do not share one store, or the
        classes to mix are rotated.
        """
        views = [self.views[name] for name in (_SPLITS if split == "all" else split.split("+"))]
        parts = [view.index for view in views]
        index = joined(parts, is_sorted=split == "all")
        if len(index.rows.unique()) < index.num_inputs:  # each split counts its rows from 0
            raise UserError(
                f"split={split}: the splits of this dataset are stored apart; use split=test"
            )
        test = self.views["test"]
        if split == "all":
            view = dataclasses.replace(test, index=index)
        elif test.has_rotations:
            raise UserError(f"split={split}: requires dataset.rotations=none, or train_classes")
        else:
            view = MixedClasses(index, num_base=len(parts[0].names))
        return self.changed(
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
        return self.changed(stores=stores, standardisation=standardisation)

    def changed(self, **changes: Any) -> "ClassData":
        """Return a copy with other attributes."""
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def class_hashes(self, split: str) -> dict[str, torch.Tensor]:
        """Return the hashes of the inputs of each class of a split, by name; {} if unknown."""
        index = self.views[split].index
        if self.hashes is None:
            return {}
        classes = zip(index.names, index.rows.cpu(), index.counts.tolist(), strict=True)
        return {name: self.hashes[rows[:count]] for name, rows, count in classes}

    def episodes(
        self, split: str, shape: Shape, seed: int, augment: Augmentation | None = None
    ) -> EpisodeSampler:
        with prefixed(f"{split} episodes"):
            changed = self._store(split, augment)
            store, support = (self.stores[split], changed) if shape.copies else (changed, None)
            view = self.views[split].sampled(shape.sampler)
            return EpisodeSampler(store, view, shape, self._key(split, seed), support)

    def batches(
        self, split: str, size: int, seed: int, augment: Augmentation | None = None
    ) -> BatchSampler:
        store, view = self._store(split, augment), self.views[split]
        return BatchSampler(store, view, size, self._key(split, seed))

    def _store(self, split: str, augment: Augmentation | None) -> Store:
        return self.stores[split] if augment is None else Augmented(self.stores[split], augment)

    def _key(self, split: str, seed: int) -> torch.Tensor:
        return prng.key_of(seed, STREAMS[split], device=self.views[split].index.rows.device)


def class_indices(
    names: list[str],
    counts: list[int],
    splits: dict[str, list[str]],
    device: torch.device,
    superclass_of: Mapping[str, str] = {},
) -> dict[str, ClassIndex]:
    """Index inputs that are ordered by class; raise UserError for a split without classes.

    Names and numbers of inputs of the classes are in the order of the inputs; splits have names.
    `superclass_of` is {} if there are none.
    """
    starts = torch.tensor([0, *counts]).cumsum(0)
    place = {name: number for number, name in enumerate(names)}
    indices = {}
    for split, chosen in splits.items():
        if not chosen:
            raise UserError(
                f"dataset.split leaves no class for {split}; add classes or change the split"
            )
        places = torch.tensor([place[name] for name in chosen])
        own = torch.tensor(counts)[places]
        column = torch.arange(int(own.max()))
        rows = starts[places, None] + torch.minimum(column, own[:, None] - 1)
        groups = tuple(superclass_of[name] for name in chosen) if superclass_of else ()
        indices[split] = ClassIndex(rows.to(device), own.to(device), tuple(chosen), groups)
    return indices
