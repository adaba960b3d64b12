"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each (Lake, Salakhutdinov and Tenenbaum 2015)."""

import dataclasses
from collections import defaultdict
from importlib import resources
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image

from metalearn.data.base import ClassData
from metalearn.data.files import PictureFile, cached, decode, files_hash, ink, list_pictures
from metalearn.data.images import ImageDataset, Pictures, seeded_split
from metalearn.download import fetch
from metalearn.errors import UserError
from metalearn.settings import anything, at_least, choice

_PARTS = ("images_background", "images_evaluation")
_DRAWINGS = 20
_RESAMPLING = {
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}


def vinyals_split() -> dict[str, list[str]]:
    """The 1028/172/423 characters of Vinyals et al. (2016), as listed in jakesnell/prototypical-networks."""
    folder = resources.files("metalearn.data") / "splits"
    return {
        split: (folder / f"omniglot_vinyals_{split}.txt").read_text().split()
        for split in ("train", "val", "test")
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Omniglot(ImageDataset):
    """Pictures of ink = 1 on paper = 0.

    split: "vinyals" (1028/172/423 characters), "random" (1100/100/423 by `split_seed`), "alphabet" (30/5/15 alphabets
    by `split_seed`, so that no alphabet stands in two splits).
    url: where the two archives are downloaded from; md5: of each.
    """

    image_size: int = at_least(8)
    resample: str = choice(*_RESAMPLING)
    split: str = choice("vinyals", "random", "alphabet")
    split_seed: int = anything()
    url: str = anything()
    md5: dict[str, str] = anything()

    def open(self, data_dir: Path, cache_dir: Path, device: torch.device) -> ClassData:
        """Finds or downloads the two archives (or their folders), decodes them once, and splits them."""
        parts = [
            path if path.exists() else fetch(f"{self.url}/{part}.zip", path.parent, self.md5[part])
            for part, path in zip(_PARTS, self.files(data_dir), strict=True)
        ]
        settings = ("1", self.image_size, self.resample, files_hash(parts))
        pictures = cached(cache_dir, "omniglot", settings, lambda: self._read(parts))
        return self.class_data(pictures, self._splits(pictures.names), device)

    def files(self, data_dir: Path) -> list[Path]:
        """The two archives or folders that are read, or where they would be downloaded to."""
        places = [
            data_dir / "omniglot",
            data_dir / "omniglot-py",
            data_dir,
        ]  # the second is torchvision's
        found = []
        for part in _PARTS:
            candidates = [place / name for place in places for name in (part, f"{part}.zip")]
            found.append(
                next((path for path in candidates if path.exists()), places[0] / f"{part}.zip")
            )
        return found

    def _read(self, parts: list[Path]) -> Pictures:
        drawings: dict[str, list[PictureFile]] = defaultdict(list)
        for part in parts:
            for file in list_pictures(part):
                drawings["/".join(PurePosixPath(file.name).parts[-3:-1])].append(file)
        expected = {name for names in vinyals_split().values() for name in names}
        where = " and ".join(str(part) for part in parts)
        if missing := sorted(expected - drawings.keys()):
            raise UserError(
                f"{where} hold {len(expected) - len(missing)} of Omniglot's {len(expected)} characters: "
                f"'{missing[0]}' is missing; bring the official archives"
            )
        names = sorted(expected)
        for name in names:
            if len(drawings[name]) != _DRAWINGS:
                raise UserError(
                    f"{where} hold {len(drawings[name])} drawings of '{name}', not {_DRAWINGS}; "
                    "bring the official archives"
                )

        images = decode(
            [file for name in names for file in sorted(drawings[name], key=_number)], self.to_array
        )
        return Pictures(images, [_DRAWINGS] * len(names), names)

    def to_array(self, picture: Image.Image) -> np.ndarray:
        """A drawing as the network sees it: uint8 [1, H, W], ink 255 on paper 0."""
        return ink(picture, self.image_size, _RESAMPLING[self.resample])

    def _splits(self, names: list[str]) -> dict[str, list[str]]:
        if self.split == "vinyals":
            return vinyals_split()
        if self.split == "random":
            return seeded_split(names, {"train": 1100, "val": 100, "test": 423}, self.split_seed)
        alphabets = seeded_split(
            sorted({_alphabet(n) for n in names}),
            {"train": 30, "val": 5, "test": 15},
            self.split_seed,
        )
        return {
            split: [n for n in names if _alphabet(n) in chosen]
            for split, chosen in alphabets.items()
        }


def _alphabet(name: str) -> str:
    return name.split("/")[0]


def _number(file: PictureFile) -> str:
    return PurePosixPath(file.name).name
