"""Several datasets as one: the classes of each episode are of one part."""

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from metalearn.config.fields import setting
from metalearn.data.base import Dataset
from metalearn.data.classes import ClassData, joined
from metalearn.data.images import moments
from metalearn.system.errors import UserError
from metalearn.tasks.store import ClassIndex, ImageStore
from metalearn.tasks.types import InputSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix(Dataset):
    """Datasets whose inputs have the same kind, shape and rotations.

    A class is named <part>/<class>. A hierarchical sampler chooses among the superclasses of all
    parts; a part without any is one. If a part standardises its images, the training images of all
    parts together standardise all.

    Args:
        parts: Names of the datasets.
        settings: Changes of their settings, which `sets` already has.
        sets: The datasets.
    """

    parts: list[str] = setting()
    settings: dict[str, Any] = setting()
    sets: dict[str, Any] = setting(components="dataset")

    def __post_init__(self) -> None:
        if len(self.sets) < 2 or list(self.sets) != self.parts:
            raise UserError(
                f"dataset.parts={self.parts}: should be two or more different datasets, given "
                "together with dataset=mix"
            )

    @property
    def reads_image_files(self) -> bool:  # type: ignore[override]
        """Return True if the parts read images."""
        return all(part.reads_image_files for part in self.sets.values())

    def to_array(self, image: Image.Image) -> np.ndarray:
        """Convert an image as the first part does."""
        array: np.ndarray = self.sets[self.parts[0]].to_array(image)
        return array

    def files(self, data_dir: Path) -> list[Path]:
        """Return the files of all parts."""
        return [file for part in self.sets.values() for file in part.files(data_dir)]

    def open(self, data_dir: Path, cache_dir: Path, device: torch.device) -> ClassData:
        opened = {name: one.open(data_dir, cache_dir, device) for name, one in self.sets.items()}
        _check(opened)
        first = opened[self.parts[0]]
        joints: dict[tuple[int, ...], Tensor] = {}
        stores, views = {}, {}
        for split in ("train", "val", "test"):
            own = [data.stores[split] for data in opened.values()]
            tensors = [_inputs(store) for store in own]
            places = tuple(tensor.data_ptr() for tensor in tensors)  # splits often share them
            if places not in joints:
                joints[places] = _joined(tensors)
            stores[split] = _with_inputs(own[0], joints[places])
            starts = [0, *itertools.accumulate(map(len, tensors))][:-1]
            indices = [_named(name, data.views[split].index) for name, data in opened.items()]
            views[split] = dataclasses.replace(first.views[split], index=joined(indices, starts))
        standardisation = first.standardisation
        if any(data.standardisation != standardisation for data in opened.values()):
            images = stores["train"].images
            shift, scale = moments(images.cpu(), views["train"].index.rows.cpu().unique())
            standardisation = {"shift": shift.tolist(), "scale": (1 / scale).tolist()}
            change = {
                name: torch.tensor(value, device=device).view(-1, 1, 1)
                for name, value in standardisation.items()
            }
            stores = {split: dataclasses.replace(one, **change) for split, one in stores.items()}
        content = repr([(name, data.content_hash) for name, data in opened.items()])
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        return ClassData(stores, views, digest, standardisation)


def _check(opened: Mapping[str, Any]) -> None:
    """Raise UserError unless all parts have the same kind, shape and rotations of inputs."""
    (first, one), *others = opened.items()
    for name, part in opened.items():
        if not isinstance(part, ClassData):
            raise UserError(f"dataset.parts: {name} has no classes; choose another")
    for name, part in others:
        a, b = one.inputs, part.inputs
        if a.kind != b.kind:
            raise UserError(
                f"dataset.parts: {first} has {a.kind}, {name} has {b.kind}; choose datasets of one "
                "kind"
            )
        if a.kind == "images" and a.shape[1:] != b.shape[1:]:
            raise UserError(
                f"dataset.parts: the images of {first} are {_by(a)}, those of {name} {_by(b)}; use "
                f"+dataset.settings={{image_size: {a.shape[-1]}}}"
            )
        if a.kind == "images" and a.shape != b.shape:
            raise UserError(
                f"dataset.parts: the images of {first} are {_by(a)}, those of {name} {_by(b)}; use "
                "+dataset.settings={colour: grey}"
            )
        if a.kind == "features" and a.shape != b.shape:
            raise UserError(
                f"dataset.parts: {first} has {_by(a)} features, {name} has {_by(b)}; choose "
                "datasets with the same number"
            )
        for split, view in one.views.items():
            own, other = view.protocol, part.views[split].protocol
            if own != other:
                raise UserError(
                    f"dataset.parts: {first} has rotations={own['rotations']} in {split}, {name} "
                    f"has {other['rotations']}; use +dataset.settings={{rotations: none}}"
                )


def _by(inputs: InputSpec) -> str:
    return "x".join(map(str, inputs.shape))


def _named(part: str, index: ClassIndex) -> ClassIndex:
    """Return an index with the name of its part in all names."""
    groups = [f"{part}/{name}" for name in index.superclasses] or [part] * len(index.names)
    return dataclasses.replace(
        index,
        names=tuple(f"{part}/{name}" for name in index.names),
        superclasses=tuple(groups),
        parts=(part,) * len(index.names),
    )


def _inputs(store: Any) -> Tensor:
    """Return all inputs of a store."""
    inputs: Tensor = store.images if isinstance(store, ImageStore) else store.values
    return inputs


def _with_inputs(store: Any, inputs: Tensor) -> Any:
    """Return a store with other inputs."""
    name = "images" if isinstance(store, ImageStore) else "values"
    return dataclasses.replace(store, **{name: inputs})


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate inputs; tokens are padded to the longest text."""
    length = max(one.shape[-1] for one in tensors)
    return torch.cat([F.pad(one, (0, length - one.shape[-1])) for one in tensors])
