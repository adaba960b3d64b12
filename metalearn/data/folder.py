"""Your own images: one subfolder per class, in a folder or in zips; any format, size and colour."""

import dataclasses
import json
import logging
from collections import defaultdict
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor

from metalearn.config.fields import at_least, choice, setting
from metalearn.data import files
from metalearn.data.classes import ClassData
from metalearn.data.files import ImageFile, list_images
from metalearn.data.images import ClassImages, ImageDataset, seeded_split, shares, split_file
from metalearn.system.download import run_download
from metalearn.system.errors import UserError, first_line

_CIFAR100_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"  # torchvision's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder(ImageDataset):
    """Images named <class>/<file>, resized by the shorter side and cropped to a centred square.

    Args:
        name: Name of the cache file.
        path: A folder, a zip, or a folder of zips; in `data_dir` unless absolute.
        image_size: Height and width in pixels.
        colour: "rgb" or "grey".
        split: "random", "cifar_fs" (Bertinetto et al. 2019), or a JSON file
            {"train": [class, ...], "val": [...], "test": [...]}.
        split_seed: Seed of a random split.
        fractions: Fractions of the classes for train, val and test in a random split.
        standardise: Whether to standardise each channel with statistics of the training images.
        background: Colour behind transparent pixels: a name such as "white", or "#rrggbb"; "none"
            for the colours that the file has there, as in runs older than this setting.
        unreadable: What to do about files that cannot be read: "error" or "skip" (leave them out).
        download: "none", or "cifar100" to let torchvision download it if `path` has no images.
    """

    name: str = setting()
    path: str = setting()
    image_size: int = at_least(8)
    colour: str = choice("rgb", "grey")
    split: str = setting()
    split_seed: int = setting()
    fractions: list[float] = at_least(0)
    standardise: bool = setting()
    background: str = setting(default="none")
    unreadable: str = choice("error", "skip", default="error")
    download: str = choice("none", "cifar100")

    def open(self, data_dir: Path, cache_dir: Path, device: torch.device) -> ClassData:
        if self.background != "none":
            try:
                ImageColor.getrgb(self.background)
            except ValueError:
                raise UserError(
                    f"dataset.background={self.background}: should be a colour such as white, "
                    "black or '#808080', or none"
                ) from None
        root = self.files(data_dir)[0]
        containers = self._containers(root)
        reading = (self.image_size, self.colour, self.background, self.unreadable)
        key = ("2", *reading, files.files_hash(containers))
        pictures = files.cached(cache_dir, self.name, key, lambda: self._read(root, containers))
        for line in pictures.notes:
            logging.getLogger(__name__).warning(line)
        return self.class_data(
            pictures, self._splits(pictures.names, root), device, self.standardise
        )

    def files(self, data_dir: Path) -> list[Path]:
        return [data_dir / Path(self.path).expanduser()]

    def _containers(self, root: Path) -> list[Path]:
        official = [root / "cifar-100-python" / part for part in ("train", "test", "meta")]

        def is_complete() -> bool:  # false after an interrupted extraction
            return self.download == "cifar100" and all(part.exists() for part in official)

        if (
            self.download == "cifar100"
            and not is_complete()
            and not _zips(root)
            and not _has_pictures(root)
        ):
            run_download(_CIFAR100_URL, root, lambda: _cifar100(root, download=True))
        if is_complete():
            return official
        if not root.exists():
            raise UserError(
                f"dataset.path={self.path}: no folder or zip at "
                f"{' or '.join(dict.fromkeys((str(Path(self.path).absolute()), str(root))))}; it "
                "should contain one subfolder per class (or use dataset=glyphs, which needs no "
                "files)"
            )
        return [root] if root.is_file() else [*_zips(root), root]

    def _read(self, root: Path, containers: list[Path]) -> ClassImages:
        if self.download == "cifar100" and containers[0].parent.name == "cifar-100-python":
            return self._official_cifar100(root)
        classes: dict[str, list[ImageFile]] = defaultdict(list)
        folders: dict[str, set[str]] = defaultdict(set)
        for container in containers:
            for file in list_images(container):
                parent = PurePosixPath(file.name).parent
                if parent.name:
                    classes[parent.name].append(file)
                    folders[parent.name].add(str(parent))
        for name, paths in folders.items():
            if len(paths) > 1:
                first, second = sorted(paths)[:2]
                raise UserError(
                    f"{root} has two folders for class '{name}': {first} and {second}; "
                    "rename or merge them"
                )
        if len(classes) < 3:
            raise UserError(
                f"{root} has {len(classes)} classes with images; "
                "should be at least 3, one each for train, val and test"
            )
        names = sorted(classes)
        images = [file for name in names for file in classes[name]]
        decoded = files.decode(images, self.to_array, self.unreadable)
        fill = "the colours hidden there" if self.background == "none" else self.background
        background = f"which become {fill} (dataset.background)"
        missing = len(decoded.left_out)
        facts = {
            f"cannot be read and are left out: {files.named(decoded.left_out)}": missing,
            f"have transparent parts, {background}": decoded.transparent,
        }
        notes = [f"{root}: {n} of {len(images)} images {what}" for what, n in facts.items() if n]
        left_out = set(decoded.left_out)
        counts = {name: len(set(classes[name]) - left_out) for name in names}
        names = [name for name in names if counts[name]]
        sizes = [counts[name] for name in names]
        return ClassImages(decoded.images, sizes, names, notes, hashes=decoded.hashes)

    def to_array(self, image: Image.Image) -> np.ndarray:
        image = files.plain(image, self.background, "RGB" if self.colour == "rgb" else "L")
        size = self.image_size
        if image.size != (size, size):
            scale = size / min(image.size)
            width, height = (max(size, round(side * scale)) for side in image.size)
            left, top = (width - size) // 2, (height - size) // 2
            image = image.resize((width, height), Image.Resampling.LANCZOS).crop(
                (left, top, left + size, top + size)
            )
        array = np.asarray(image)
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)

    def _official_cifar100(self, root: Path) -> ClassImages:
        """Read all 60,000 images of CIFAR-100, ordered by class; torchvision verifies checksums."""
        try:
            halves = [_cifar100(root, train=train) for train in (True, False)]
        except (RuntimeError, OSError, EOFError) as error:
            raise UserError(
                f"{root}/cifar-100-python is not CIFAR-100 ({first_line(error)}); "
                "remove it to download it again"
            ) from None
        labels = np.concatenate([half.targets for half in halves])
        pixels = np.concatenate([half.data for half in halves])[np.argsort(labels, kind="stable")]
        images = np.stack([self.to_array(Image.fromarray(array)) for array in pixels])
        return ClassImages(
            torch.from_numpy(images),
            np.bincount(labels).tolist(),
            list(halves[0].classes),
            hashes=torch.tensor([files.pixel_hash(array) for array in pixels]),
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
            splits = split_file(Path(self.split).expanduser())
        if unknown := [name for chosen in splits.values() for name in chosen if name not in names]:
            raise UserError(
                f"dataset.split={self.split} names class '{unknown[0]}', which {root} does not have"
            )
        return splits


def _cifar100(root: Path, **options: bool) -> Any:
    """Open CIFAR-100 with torchvision, which verifies checksums."""
    from torchvision.datasets import CIFAR100  # takes seconds to import

    return CIFAR100(str(root), **options)


def _zips(root: Path) -> list[Path]:
    return sorted(root.glob("*.zip")) if root.is_dir() else []


def _has_pictures(root: Path) -> bool:
    return root.is_dir() and bool(list_images(root))
