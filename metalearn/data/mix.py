"""Several datasets as one: the classes of each episode are of one part."""

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix(Dataset):
    """Datasets whose inputs have the same kind, shape and rotations.

    A class is named <part>/<class>. A hierarchical sampler chooses among the superclasses of all
    parts; a part without any is one. If a part standardises its images, the training images of all
    parts together standardise all. `sets` are the datasets, with the changes of `settings`.
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
        return all(part.reads_image_files for part in self.sets.values())

    def to_array(self, image: Image.Image) -> np.ndarray:
        """Convert an image as the first part does."""
        array: np.ndarray = self.sets[self.parts[0]].to_array(image)
        return array

    @property
    def addresses(self) -> list[str]:
        return [address for part in self.sets.values() for address in part.addresses]

    def files(self, data_dir: Path) -> list[Path]:
        return [file for part in self.sets.values() for file in part.files(data_dir)]

    def is_present(self, data_dir: Path) -> bool:
        return all(part.is_present(data_dir) for part in self.sets.values())

    def open(self, data_dir: Path, cache_dir: Path, device: torch.device) -> ClassData:
        for name, one in self.sets.items():
            if (labels := getattr(one, "labels", "given")) != "given":
                raise UserError(
                    f"dataset.settings: labels={labels} of {name} is impossible in a mixed "
                    "dataset; leave it out"
                )
        opened = {name: one.open(data_dir, cache_dir, device) for name, one in self.sets.items()}
        _check(opened)
        _check_overlap(opened)
        first = opened[self.parts[0]]
        is_on_host = any(data.is_on_host for data in opened.values())
        where = torch.device("cpu") if is_on_host else device
        joints: dict[tuple[int, ...], Tensor] = {}
        stores: dict[str, Any] = {}
        views = {}
        for split in ("train", "val", "test"):
            own: list[Any] = [data.stores[split] for data in opened.values()]
            field = "images" if isinstance(own[0], ImageStore) else "values"
            tensors: list[Tensor] = [getattr(store, field).to(where) for store in own]
            places = tuple(tensor.data_ptr() for tensor in tensors)  # splits often share them
            if places not in joints:
                length = max(one.shape[-1] for one in tensors)  # of texts: they are padded
                padded = [F.pad(one, (0, length - one.shape[-1])) for one in tensors]
                joints[places] = torch.cat(padded)
            stores[split] = dataclasses.replace(own[0], **{field: joints[places]})
            starts = [0, *itertools.accumulate(map(len, tensors))][:-1]
            parts = {name: data.views[split].index for name, data in opened.items()}
            indices = [_named(name, index, where) for name, index in parts.items()]
            views[split] = dataclasses.replace(first.views[split], index=joined(indices, starts))
        standardisation = first.standardisation
        if any(data.standardisation != standardisation for data in opened.values()):
            images = stores["train"].images
            shift, scale = moments(images.cpu(), views["train"].index.rows.cpu().unique())
            standardisation = {"shift": shift.tolist(), "scale": (1 / scale).tolist()}
        content = repr([(name, data.content_hash) for name, data in opened.items()])
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        hashes = [data.hashes for data in opened.values() if data.hashes is not None]
        whole = torch.cat(hashes) if len(hashes) == len(opened) else None
        data = ClassData(stores, views, digest, {}, whole, is_on_host)
        return data.standardised(standardisation)


def _check(opened: Mapping[str, Any]) -> None:
    """Raise UserError unless all parts have the same kind, shape and rotations of inputs."""
    for name, part in opened.items():
        if not isinstance(part, ClassData):
            raise UserError(f"dataset.parts: {name} has no classes; choose another")
    (first, one), *others = ((name, _properties(part)) for name, part in opened.items())
    for name, properties in others:
        for (own, use), (other, _) in zip(one, properties, strict=False):
            if own != other:
                raise UserError(f"dataset.parts: {first} has {own}, {name} has {other}; {use}")


def _check_overlap(opened: Mapping[str, ClassData]) -> None:
    """Raise UserError if a part has images for training or validation that another tests on."""
    for (first, one), (later, two) in itertools.permutations(opened.items(), 2):
        for before, after in itertools.combinations(("train", "val", "test"), 2):
            none, tested = torch.zeros(0, dtype=torch.int64), two.class_hashes(after)
            used = torch.cat([none, *one.class_hashes(before).values()])
            if torch.isin(torch.cat([none, *tested.values()]), used).any():
                shared = [name for name, own in tested.items() if torch.isin(own, used).any()]
                raise UserError(
                    f"dataset.parts: images of the {before} split of {first} are in the {after} "
                    f"split of {later} ({', '.join(shared[:30])}); leave one of the parts out, or "
                    "give both the same split by +dataset.settings"
                )


def _properties(data: ClassData) -> list[tuple[str, str]]:
    """Return the properties that parts share, each with what makes them equal."""
    kind, shape = data.inputs.kind, data.inputs.shape
    settings = "use +dataset.settings="
    properties = [(kind, "choose datasets of one kind of input")]
    if kind == "images":
        size = f"images of {shape[1]}x{shape[2]} pixels"
        properties.append((size, f"{settings}{{image_size: {shape[-1]}}}"))
        properties.append((f"{shape[0]} channels", f"{settings}{{colour: grey}}"))
    if kind == "features":
        properties.append((f"vectors of {shape[0]}", "choose datasets with equal vectors"))
    for split in ("train", "val", "test"):
        for key, value in data.views[split].protocol.items():
            properties.append((f"{key}={value} in {split}", f"{settings}{{rotations: none}}"))
    return properties


def _named(part: str, index: ClassIndex, device: torch.device) -> ClassIndex:
    """Return an index on a device, with the name of its part in all names."""
    groups = [f"{part}/{name}" for name in index.superclasses] or [part] * len(index.names)
    return dataclasses.replace(
        index,
        rows=index.rows.to(device),
        counts=index.counts.to(device),
        names=tuple(f"{part}/{name}" for name in index.names),
        superclasses=tuple(groups),
        parts=(part,) * len(index.names),
    )
