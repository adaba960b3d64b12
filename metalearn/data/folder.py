"""One's own pictures: one sub-folder a class, in a folder or in zips; any format and size, grey or colour."""

import dataclasses
import json
from collections import defaultdict
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from metalearn.data.base import ClassData
from metalearn.data.files import PictureFile, cached, decode, files_hash, list_pictures
from metalearn.data.images import ImageDataset, Pictures, seeded_split, shares
from metalearn.download import with_network
from metalearn.errors import UserError, first_line
from metalearn.settings import anything, at_least, choice

_CIFAR100_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"  # torchvision's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder(ImageDataset):
    """Pictures named <class>/<file>, below `path` (in `data_dir` unless absolute): a folder, a zip, or a folder of zips.

    name: of the cache file. colour: "rgb" or "grey". Pictures are resized (shorter side first) and cropped in the middle to a square.
    split: "random" (by `split_seed`, with `fractions` of the classes for train, val and test), a JSON file
    {"train": [class, ...], "val": [...], "test": [...]}, or "cifar_fs" (Bertinetto et al. 2019).
    download: "none", or "cifar100": CIFAR-100 through torchvision when nothing lies in `path`.
    """

    name: str = anything()
    path: str = anything()
    image_size: int = at_least(8)
    colour: str = choice("rgb", "grey")
    split: str = anything()
    split_seed: int = anything()
    fractions: list[float] = at_least(0)
    standardise: bool = anything()
    download: str = choice("none", "cifar100")

    def open(self, data_dir: Path, cache_dir: Path, device: torch.device) -> ClassData:
        """Reads the pictures once, keeps them in the cache, and splits them."""
        root = self.files(data_dir)[0]
        containers = self._containers(root)
        settings = ("1", self.image_size, self.colour, files_hash(containers))
        pictures = cached(cache_dir, self.name, settings, lambda: self._read(root, containers))
        return self.class_data(
            pictures, self._splits(pictures.names, root), device, self.standardise
        )

    def files(self, data_dir: Path) -> list[Path]:
        """The folder or zip that is read."""
        return [data_dir / Path(self.path).expanduser()]

    def _containers(self, root: Path) -> list[Path]:
        official = [root / "cifar-100-python" / part for part in ("train", "test", "meta")]

        def whole() -> bool:  # not if unpacking it was cut off
            return self.download == "cifar100" and all(part.exists() for part in official)

        if (
            self.download == "cifar100"
            and not whole()
            and not _zips(root)
            and not _has_pictures(root)
        ):
            with_network(_CIFAR100_URL, root, lambda: _cifar100(root, download=True))
        if whole():
            return official
        if not root.exists():
            raise UserError(
                f"dataset.path={self.path}: no folder or zip at {root}; it should hold one sub-folder a class "
                "(or use dataset=glyphs, which needs no files)"
            )
        return [root] if root.is_file() else [*_zips(root), root]

    def _read(self, root: Path, containers: list[Path]) -> Pictures:
        if self.download == "cifar100" and containers[0].parent.name == "cifar-100-python":
            return self._official_cifar100(root)
        classes: dict[str, list[PictureFile]] = defaultdict(list)
        folders: dict[str, set[str]] = defaultdict(set)
        for container in containers:
            for file in list_pictures(container):
                parent = PurePosixPath(file.name).parent
                if parent.name:
                    classes[parent.name].append(file)
                    folders[parent.name].add(str(parent))
        for name, found in folders.items():
            if len(found) > 1:
                first, second = sorted(found)[:2]
                raise UserError(
                    f"{root} has two folders for class '{name}': {first} and {second}; name classes apart"
                )
        if len(classes) < 3:
            raise UserError(
                f"{root} has {len(classes)} classes with pictures; train, val and test need one each at least"
            )
        names = sorted(classes)
        images = decode([file for name in names for file in classes[name]], self.to_array)
        return Pictures(images, [len(classes[name]) for name in names], names)

    def to_array(self, picture: Image.Image) -> np.ndarray:
        """A picture of any format and size as the network sees it: uint8 [C, H, W]."""
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):  # 16 bits a pixel, which convert() would cut off at 255
            picture = Image.fromarray((np.asarray(picture) // 256).astype(np.uint8))
        picture = picture.convert("RGB" if self.colour == "rgb" else "L")
        size = self.image_size
        if picture.size != (size, size):
            scale = size / min(picture.size)
            width, height = (max(size, round(side * scale)) for side in picture.size)
            left, top = (width - size) // 2, (height - size) // 2
            picture = picture.resize((width, height), Image.Resampling.LANCZOS).crop(
                (left, top, left + size, top + size)
            )
        array = np.asarray(picture)
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)

    def _official_cifar100(self, root: Path) -> Pictures:
        """All 60,000 pictures of torchvision's CIFAR-100 (its checksums hold), class after class."""
        try:
            halves = [_cifar100(root, train=train) for train in (True, False)]
        except (RuntimeError, OSError, EOFError) as error:
            raise UserError(
                f"{root}/cifar-100-python is not CIFAR-100 ({first_line(error)}); remove it"
            ) from None
        labels = np.concatenate([half.targets for half in halves])
        pictures = np.concatenate([half.data for half in halves])[np.argsort(labels, kind="stable")]
        images = np.stack([self.to_array(Image.fromarray(picture)) for picture in pictures])
        return Pictures(
            torch.from_numpy(images), np.bincount(labels).tolist(), list(halves[0].classes)
        )

    def _splits(self, names: list[str], root: Path) -> dict[str, list[str]]:
        if self.split == "random":
            return seeded_split(names, shares(len(names), self.fractions), self.split_seed)
        if self.split == "cifar_fs":
            folder = resources.files("metalearn.data") / "splits"
            splits = {
                split: [
                    fine for _, fine in json.loads((folder / f"cifar_fs_{split}.json").read_text())
                ]
                for split in ("train", "val", "test")
            }
        else:
            splits = _split_file(Path(self.split).expanduser())
        if unknown := [name for chosen in splits.values() for name in chosen if name not in names]:
            raise UserError(
                f"dataset.split={self.split} names class '{unknown[0]}', which {root} does not have"
            )
        return splits


def _cifar100(root: Path, **options: bool) -> Any:
    """Torchvision's CIFAR-100, which checks what it reads; imported here because that takes seconds."""
    from torchvision.datasets import CIFAR100

    return CIFAR100(str(root), **options)


def _split_file(path: Path) -> dict[str, list[str]]:
    wanted = 'JSON with {"train": [class, ...], "val": [...], "test": [...]}'
    try:
        splits = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"dataset.split={path} should be random, cifar_fs or a file of {wanted} ({error})"
        ) from None
    lists = isinstance(splits, dict) and all(isinstance(names, list) for names in splits.values())
    if not lists or set(splits) != {"train", "val", "test"}:
        raise UserError(f"dataset.split={path} should be {wanted}")
    for split, names in splits.items():
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"dataset.split={path} has class '{twice[0]}' twice in {split}")
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        if shared := [name for name in splits[first] if name in splits[second]]:
            raise UserError(
                f"dataset.split={path} has class '{shared[0]}' in both {first} and {second}"
            )
    return splits


def _zips(root: Path) -> list[Path]:
    return sorted(root.glob("*.zip")) if root.is_dir() else []


def _has_pictures(root: Path) -> bool:
    return root.is_dir() and bool(list_pictures(root))
