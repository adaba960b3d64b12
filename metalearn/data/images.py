"""A data set of pictures: decoded images, classes and splits, ready to draw tasks from."""

import dataclasses
import hashlib
import logging

import torch
from torch import Tensor

from metalearn import random
from metalearn.episodes import STREAMS, ClassTable, ImageBatches, ImageEpisodes, ImageStore, Shape
from metalearn.errors import UserError

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
    order = random.permutation(random.key_of(seed), len(names)).tolist()
    chosen: dict[str, list[str]] = {}
    start = 0
    for split, size in sizes.items():
        chosen[split] = [names[index] for index in order[start : start + size]]
        start += size
    return chosen


def shares(total: int, fractions: list[float]) -> dict[str, int]:
    """How many of `total` classes train, val and test get; what rounding leaves over goes to train."""
    if len(fractions) != 3 or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(f"dataset.fractions={list(fractions)} should be three shares (train, val, test) that sum to 1")
    val, test = (round(total * fraction) for fraction in fractions[1:])
    return {"train": total - val - test, "val": val, "test": test}


class ImageData:
    """Pictures on the device with their splits; hands out task sources.

    standardise: subtract the mean and divide by the standard deviation of the training pictures, for each channel.
    rotations: "none"; "train_classes" or "classes" (each class stands for four, in training or everywhere);
    "episode" (a random quarter turn of each class in each episode).
    """

    target = "class"

    def __init__(
        self,
        pictures: Pictures,
        splits: dict[str, list[str]],
        *,
        rotations: str,
        rotations_may_meet: bool,
        standardise: bool,
        device: torch.device,
    ) -> None:
        index_of = {name: index for index, name in enumerate(pictures.names)}
        starts = torch.tensor([0, *pictures.counts]).cumsum(0).tolist()
        self.content_hash = pictures.content_hash()
        self.device = device
        self.input_shape = tuple(pictures.images.shape[1:])
        self._tables: dict[str, ClassTable] = {}
        for split, names in splits.items():
            if not names:
                raise UserError(f"dataset.split leaves no class for {split}: bring more classes or another split")
            counts = torch.tensor([pictures.counts[index_of[name]] for name in names])
            column = torch.arange(int(counts.max()))
            first = torch.tensor([starts[index_of[name]] for name in names])
            rows = first[:, None] + torch.minimum(column, counts[:, None] - 1)
            self._tables[split] = ClassTable(
                rows.to(device),
                counts.to(device),
                tuple(names),
                turned=rotations == "classes" or (rotations == "train_classes" and split == "train"),
                turned_may_meet=rotations_may_meet,
                turn_in_episode=rotations == "episode",
            )
        channels = self.input_shape[0]
        shift, scale = torch.zeros(channels), torch.ones(channels)
        if standardise:
            shift, scale = _moments(pictures.images, self._tables["train"].rows.cpu().unique())
        self._store = ImageStore(
            pictures.images.to(device), shift.view(-1, 1, 1).to(device), 1 / scale.view(-1, 1, 1).to(device)
        )

    @property
    def standardisation(self) -> dict[str, list[float]]:
        """What is subtracted from x / 255, and what multiplied then, for each channel."""
        return {"shift": self._store.shift.flatten().tolist(), "scale": self._store.scale.flatten().tolist()}

    def class_names(self, split: str) -> tuple[str, ...]:
        """Names of the classes of a split; a class keeps its name when it is turned."""
        return self._tables[split].names

    def num_classes(self, split: str) -> int:
        return self._tables[split].num_classes

    def protocol(self, split: str) -> dict[str, object]:
        """What of the data a measurement on this split depends on."""
        table = self._tables[split]
        others = [self._tables[name].names for name in self._tables if name != split]
        rotations = "classes" if table.turned else "episode" if table.turn_in_episode else "none"
        return {
            "data": self.content_hash,
            "classes": hashlib.sha256(repr(table.names).encode()).hexdigest()[:16],
            "split": hashlib.sha256(repr(others).encode()).hexdigest()[:16],  # what was left to train and validate on
            "num_classes": table.num_classes,
            "rotations": rotations,
            "rotations_may_meet": table.turned_may_meet if table.turned else None,
        }

    def episodes(self, split: str, shape: Shape, seed: int) -> ImageEpisodes:
        """N-way K-shot episodes of a split."""
        try:
            key = random.key_of(seed, STREAMS[split], device=self.device)
            return ImageEpisodes(self._store, self._tables[split], shape, key)
        except UserError as error:
            raise UserError(f"{split} episodes: {error}") from None

    def batches(self, split: str, batch: int, seed: int) -> ImageBatches:
        """Ordinary batches with global labels of a split."""
        key = random.key_of(seed, STREAMS[split], device=self.device)
        return ImageBatches(self._store, self._tables[split], batch, key)


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
        logging.getLogger(__name__).warning("a colour channel is constant over the training pictures")
    return shift, scale.clamp_min(1e-3)
