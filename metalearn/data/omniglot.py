"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 images each (Lake et al. 2015)."""

import dataclasses
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from metalearn.config.fields import at_least, choice, setting
from metalearn.data.class_splits import seeded_split, split_file
from metalearn.data.classes import ClassData
from metalearn.data.files import ImageFile, cached, decode, files_hash, ink, list_images
from metalearn.data.images import ClassImages, ImageDataset
from metalearn.system.download import fetch
from metalearn.system.errors import UserError

_PARTS = ("images_background", "images_evaluation")
_NUM_IMAGES = 20
_RESAMPLING = {name: Image.Resampling[name.upper()] for name in ("lanczos", "bilinear", "box")}


def vinyals_split() -> dict[str, list[str]]:
    """Read the split of Vinyals et al. (2016) from the lists in jakesnell/prototypical-networks."""
    return split_file(Path(__file__).parent / "splits/omniglot_vinyals.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Omniglot(ImageDataset):
    """Images with ink = 1 and paper = 0.

    The split is that of Vinyals (1028/172/423 characters), random (1100/100/423), or of 30/5/15
    alphabets, so that no alphabet is in two splits. `url` is the folder of the two archives.
    """

    pen: ClassVar[float | None] = 0.03

    image_size: int = at_least(8)
    resample: str = choice(*_RESAMPLING)
    split: str = choice("vinyals", "random", "alphabet")
    split_seed: int = setting()
    url: str = setting()
    md5: dict[str, str] = setting()

    @property
    def addresses(self) -> list[str]:
        return [f"{self.url}/{part}.zip" for part in _PARTS]

    def open(self, data_dir: Path, cache_dir: Path, device: torch.device) -> ClassData:
        sources = zip(_PARTS, self.files(data_dir), self.addresses, strict=True)
        parts = [
            path if path.exists() else fetch(address, path.parent, self.md5[part])
            for part, path, address in sources
        ]
        settings = ("1", self.image_size, self.resample, files_hash(parts))
        pictures = cached(cache_dir, "omniglot", settings, lambda: self._read(parts))
        alphabets = {name: _alphabet(name) for name in pictures.names}
        splits = self._splits(pictures.names)
        return self.class_data(pictures, splits, device, superclass_of=alphabets)

    def files(self, data_dir: Path) -> list[Path]:
        # omniglot-py is torchvision's name.
        folders = [data_dir / "omniglot", data_dir / "omniglot-py", data_dir]
        paths = []
        for part in _PARTS:
            known = [folder / name for folder in folders for name in (part, f"{part}.zip")]
            paths.append(next((path for path in known if path.exists()), known[1]))
        return paths

    def _read(self, parts: list[Path]) -> ClassImages:
        images_of: dict[str, list[ImageFile]] = defaultdict(list)
        for part in parts:
            for file in list_images(part):
                images_of["/".join(PurePosixPath(file.name).parts[-3:-1])].append(file)
        expected = {name for names in vinyals_split().values() for name in names}
        where = " and ".join(str(part) for part in parts)
        if missing := sorted(expected - images_of.keys()):
            raise UserError(
                f"{where} contain {len(expected) - len(missing)} of Omniglot's {len(expected)} "
                f"characters: '{missing[0]}' is missing; use the official archives"
            )
        names = sorted(expected)
        for name in names:
            if len(images_of[name]) != _NUM_IMAGES:
                raise UserError(
                    f"{where} contain {len(images_of[name])} images of '{name}', "
                    f"not {_NUM_IMAGES}; use the official archives"
                )

        files = [sorted(images_of[name], key=lambda file: Path(file.name).name) for name in names]
        decoded = decode([file for own in files for file in own], self.to_array)
        counts = [_NUM_IMAGES] * len(names)
        return ClassImages(decoded.images, counts, names, hashes=decoded.hashes)

    def to_array(self, image: Image.Image) -> np.ndarray:
        return ink(image, self.image_size, _RESAMPLING[self.resample])

    def _splits(self, names: list[str]) -> dict[str, list[str]]:
        if self.split == "vinyals":
            return vinyals_split()
        if self.split == "random":
            return seeded_split(names, {"train": 1100, "val": 100, "test": 423}, self.split_seed)
        sizes = {"train": 30, "val": 5, "test": 15}
        alphabets = seeded_split(sorted(set(map(_alphabet, names))), sizes, self.split_seed)
        return {
            split: [n for n in names if _alphabet(n) in chosen]
            for split, chosen in alphabets.items()
        }


def _alphabet(name: str) -> str:
    return name.split("/")[0]
