"""Your own or published images: one subfolder per class, or another layout of `layouts`."""

import contextlib
import dataclasses
import logging
from collections import defaultdict
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageColor

from metalearn.config.fields import at_least, choice, setting
from metalearn.data import archives, class_splits, files, layouts
from metalearn.data.classes import ClassData
from metalearn.data.files import ImageFile
from metalearn.data.images import ClassImages, ImageDataset
from metalearn.system.download import fetch
from metalearn.system.errors import UserError

#: What `download: cifar100` of older runs means.
_CIFAR100 = (
    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    "eb9058c3a382ffc7106e4002c42a8d85",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder(ImageDataset):
    """Images named <class>/<file>, resized by the shorter side and cropped to a centred square.

    The split is "random"; the name of a published one; "files", if the files have splits (see
    `layouts`); or a JSON file {"train": [class, ...], "val": [...], "test": [...]}. `name` is that
    of the cache file. With background=none, transparent parts have the colours that the file has
    there.
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
    exclude: list[str] = setting(default=[])
    url: str = setting(default="", role="machine")
    md5: str = setting(default="", role="machine")
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
        key = ("2", *reading, files.files_hash(containers, layouts.SUFFIXES))
        pictures = files.cached(
            cache_dir, self.name, key, lambda: self._read(root, containers, cache_dir)
        )
        for line in pictures.notes:
            logging.getLogger(__name__).warning(line)
        splits = self._splits(pictures, root)
        groups = class_splits.published_superclasses(pictures.names)
        return self.class_data(pictures, splits, device, self.standardise, groups)

    @property
    def addresses(self) -> list[str]:
        return [address for address, _ in self._archives()]

    def _archives(self) -> list[tuple[str, str]]:
        """Return the address and the checksum of what can be downloaded."""
        if self.url:
            return [(self.url, self.md5)]
        return [_CIFAR100] if self.download == "cifar100" else []

    def files(self, data_dir: Path) -> list[Path]:
        return [data_dir / Path(self.path).expanduser()]

    def is_present(self, data_dir: Path) -> bool:
        root = self.files(data_dir)[0]
        return root.is_file() or any(
            layouts.is_data(path.name) for path in root.rglob("*") if path.is_file()
        )

    def _containers(self, root: Path) -> list[Path]:
        containers = layouts.containers(root)
        if not containers:
            for address, md5 in self._archives():
                fetch(address, root, md5)
            containers = layouts.containers(root)
        if not containers:
            places = dict.fromkeys((str(Path(self.path).absolute()), str(root)))
            absent = f"no folder or zip at {' or '.join(places)}"
            raise UserError(
                f"dataset.path={self.path}: {f'no images in {root}' if root.exists() else absent}; "
                f"bring there {self.by_hand or 'one subfolder per class'} (or use dataset=glyphs, "
                "which needs no files)"
            )
        return containers

    def _read(self, root: Path, containers: list[Path], cache_dir: Path) -> ClassImages:
        with contextlib.ExitStack() as stack:
            content = []
            for archive in containers:
                container = stack.enter_context(archives.unpacked(archive, cache_dir))
                listed = files.list_images(container, layouts.SUFFIXES)
                content += [file._replace(archive=archive) for file in listed]
            if read := layouts.arrays(content):
                return read(self.to_array)
            return self._decode(root, content)

    def _decode(self, root: Path, content: list[ImageFile]) -> ClassImages:
        """Decode images of class folders, or of one folder with lists of labels."""
        classes, splits = layouts.by_lists(content) or (_by_folder(root, content), {})
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
        return ClassImages(decoded.images, sizes, names, notes, splits, decoded.hashes)

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

    def _splits(self, pictures: ClassImages, root: Path) -> dict[str, list[str]]:
        names = [name for name in pictures.names if name not in self.exclude]
        published = class_splits.published_split(self.split)
        # Files with numbers or words instead of the published names have splits of their own.
        known = class_splits.split_file(published).values() if published else []
        is_renamed = bool(pictures.splits and known) and not any(
            name in names for some in known for name in some
        )
        if is_renamed:
            logging.getLogger(__name__).warning(
                f"{root} has none of the class names of dataset.split={self.split}; the split of "
                "its files is used"
            )
        if self.split == "files" or is_renamed:
            if not pictures.splits:
                raise UserError(
                    f"dataset.split=files: {root} has no train.csv, val.csv and test.csv, and no "
                    "file for each split; use dataset.split=random"
                )
            return {
                split: [name for name in some if name in names]
                for split, some in pictures.splits.items()
            }
        return class_splits.split_classes(
            self.split, names, self.fractions, self.split_seed, str(root)
        )


def _by_folder(root: Path, content: list[ImageFile]) -> dict[str, list[ImageFile]]:
    """Return the images of each class folder; raise UserError if two have the same name."""
    classes: dict[str, list[ImageFile]] = defaultdict(list)
    folders: dict[str, set[str]] = defaultdict(set)
    for file in content:
        parent = PurePosixPath(file.name).parent
        if parent.name and layouts.is_image(file.name):
            classes[parent.name].append(file)
            folders[parent.name].add(str(parent))
    for name, paths in folders.items():
        if len(paths) > 1:
            first, second = sorted(paths)[:2]
            raise UserError(
                f"{root} has two folders for class '{name}': {first} and {second}; "
                "rename or merge them"
            )
    return classes
