"""Datasets of images: decoded images, classes and splits, ready to draw tasks from."""

import dataclasses
import hashlib
import logging

import torch
from torch import Tensor

from metalearn.data.base import ClassData, Dataset
from metalearn.errors import UserError
from metalearn.settings import anything, choice
from metalearn.tasks import prng
from metalearn.tasks.store import ClassIndex, ClassView, ImageStore, RotatedClasses, RotatedEpisodes

ROTATIONS = ("none", "train_classes", "classes", "episode")


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Decoded pictures before any split.

    images: uint8 [I, C, H, W], class after class; counts: images of each class; names: of each class.
    """

    images: Tensor
    counts: list[int]
    names: list[str]

    def content_hash(self) -> str:
        """Identifies pixels, classes and their order, whatever files they came from."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
        digest.update(repr((tuple(self.images.shape), self.counts, self.names)).encode())
        return digest.hexdigest()[:16]


def seeded_split(names: list[str], sizes: dict[str, int], seed: int) -> dict[str, list[str]]:
    """Classes of each split, drawn without replacement from the sorted names."""
    names = sorted(names)
    order = prng.permutation(prng.key_of(seed), len(names)).tolist()
    chosen: dict[str, list[str]] = {}
    start = 0
    for split, size in sizes.items():
        chosen[split] = [names[index] for index in order[start : start + size]]
        start += size
    return chosen


def shares(total: int, fractions: list[float]) -> dict[str, int]:
    """How many of `total` classes train, val and test get; what rounding leaves over goes to train."""
    if len(fractions) != 3 or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(
            f"dataset.fractions={list(fractions)} should be three shares (train, val, test) that sum to 1"
        )
    val, test = (round(total * fraction) for fraction in fractions[1:])
    return {"train": total - val - test, "val": val, "test": test}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageDataset(Dataset):
    """Settings that all datasets of images share.

    rotations: "none"; "train_classes" or "classes" (each class stands for four, rotated by 0, 90, 180 and 270 degrees, in
    training or everywhere); "episode" (each class is rotated at random in each episode).
    rotations_may_meet, rotations_share_drawings: see `RotatedClasses`.
    """

    rotations: str = choice(*ROTATIONS)
    rotations_may_meet: bool = anything()
    rotations_share_drawings: bool = anything(default=True)

    def class_data(
        self,
        pictures: Pictures,
        splits: dict[str, list[str]],
        device: torch.device,
        standardise: bool = False,
    ) -> ClassData:
        """Return decoded images on the device, ready to draw tasks from.

        Args:
            pictures: all images.
            splits: names of the classes of each split.
            device: where the images are kept.
            standardise: subtract the mean and divide by the standard deviation of the training images, for each channel.
        """
        index_of = {name: index for index, name in enumerate(pictures.names)}
        starts = torch.tensor([0, *pictures.counts]).cumsum(0).tolist()
        views: dict[str, ClassView] = {}
        for split, names in splits.items():
            if not names:
                raise UserError(
                    f"dataset.split leaves no class for {split}: bring more classes or another split"
                )
            counts = torch.tensor([pictures.counts[index_of[name]] for name in names])
            column = torch.arange(int(counts.max()))
            first = torch.tensor([starts[index_of[name]] for name in names])
            rows = first[:, None] + torch.minimum(column, counts[:, None] - 1)
            index = ClassIndex(rows.to(device), counts.to(device), tuple(names))
            if self.rotations == "classes" or (
                self.rotations == "train_classes" and split == "train"
            ):
                views[split] = RotatedClasses(
                    index, self.rotations_may_meet, self.rotations_share_drawings
                )
            else:
                views[split] = (
                    RotatedEpisodes(index) if self.rotations == "episode" else ClassView(index)
                )
        channels = pictures.images.shape[1]
        shift, scale = torch.zeros(channels), torch.ones(channels)
        if standardise:
            shift, scale = _moments(pictures.images, views["train"].index.rows.cpu().unique())
        store = ImageStore(
            pictures.images.to(device),
            shift.view(-1, 1, 1).to(device),
            1 / scale.view(-1, 1, 1).to(device),
        )
        stores = {
            name: dataclasses.replace(store, has_rotations=view.has_rotations)
            for name, view in views.items()
        }
        standardisation = {
            "shift": store.shift.flatten().tolist(),
            "scale": store.scale.flatten().tolist(),
        }
        return ClassData(stores, views, pictures.content_hash(), standardisation)


def _moments(images: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] of x / 255 over the chosen pictures, exact by counting the 256 values."""
    value = torch.arange(256, dtype=torch.float64) / 255
    moments = []
    for channel in range(images.shape[1]):
        share = torch.bincount(images[rows, channel].flatten(), minlength=256).double()
        share /= share.sum()
        mean = (share * value).sum()
        moments.append((mean, (share * (value - mean).square()).sum().sqrt()))
    shift, scale = (torch.stack(column).float() for column in zip(*moments, strict=True))
    if (scale == 0).any():
        logging.getLogger(__name__).warning(
            "a colour channel is constant over the training pictures"
        )
    return shift, scale.clamp_min(1e-3)
