"""An opened dataset with classes, of any kind of input."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import torch

from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.sampling import STREAMS, BatchSampler, EpisodeSampler, Shape
from metalearn.tasks.store import Augmentation, Augmented, ClassIndex, ClassView, Store


def joined(indices: Sequence[ClassIndex], offsets: Sequence[int] | None = None) -> ClassIndex:
    """Return the classes of several indices, ordered by name.

    Args:
        indices: At least one.
        offsets: Number that is added to the rows of each index; None for 0.
    """
    last = torch.arange(max(one.rows.shape[1] for one in indices))
    rows = [
        one.rows[:, last.clamp_max(one.rows.shape[1] - 1)] + offset
        for one, offset in zip(indices, offsets or [0] * len(indices), strict=True)
    ]
    names = [name for one in indices for name in one.names]
    order = sorted(range(len(names)), key=names.__getitem__)

    def ordered(field: str) -> tuple[str, ...]:
        values = [value for one in indices for value in getattr(one, field)]
        return tuple(values[place] for place in order) if values else ()

    return ClassIndex(
        torch.cat(rows)[order],
        torch.cat([one.counts for one in indices])[order],
        **{field: ordered(field) for field in ("names", "superclasses", "parts")},
    )


class ClassData:
    """An opened dataset with classes: an input store and a view of the classes of each split."""

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
        """Return the names of the classes of a split."""
        return self.views[split].index.names

    def num_classes(self, split: str) -> int:
        """Return the number of classes of a classifier over a split, rotated classes included."""
        return self.views[split].num_classes

    def protocol(self, split: str) -> dict[str, object]:
        """Return the hashes of data and classes, the number of classes, and the rotations."""
        others = [
            view.index.names for name, view in self.views.items() if split not in (name, "all")
        ]
        return {
            "data": self.content_hash,
            "classes": hashlib.sha256(repr(self.class_names(split)).encode()).hexdigest()[:16],
            # The classes of the other splits: those available for training and validation.
            "split": hashlib.sha256(repr(others).encode()).hexdigest()[:16],
            "num_classes": self.num_classes(split),
            **self.views[split].protocol,
        }

    def with_all_classes(self) -> "ClassData":
        """Return the data with one more split, "all": the classes of all splits, by name.

        Raises:
            UserError: If the splits do not share one store of inputs.
        """
        index = joined([view.index for view in self.views.values()])
        if len(index.rows.unique()) < index.num_inputs:  # each split counts its rows from 0
            raise UserError(
                "split=all: the splits of this dataset are stored apart; use split=test"
            )
        views = {**self.views, "all": dataclasses.replace(self.views["test"], index=index)}
        stores = {**self.stores, "all": self.stores["test"]}
        return ClassData(stores, views, self.content_hash, self.standardisation)

    def episodes(
        self, split: str, shape: Shape, seed: int, augment: Augmentation | None = None
    ) -> EpisodeSampler:
        """Return a sampler of the episodes of a split."""
        try:
            changed = self._store(split, augment)
            store, support = (self.stores[split], changed) if shape.copies else (changed, None)
            view = self.views[split].sampled(shape.sampler)
            return EpisodeSampler(store, view, shape, self._key(split, seed), support)
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
