"""Datasets of images: decoded images, classes and splits, ready to sample tasks."""

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metalearn.config.fields import at_least, choice, given_by_run, setting
from metalearn.data.base import Dataset
from metalearn.data.classes import ClassData, class_indices
from metalearn.tasks.store import ClassView, ImageStore, RotatedClasses, RotatedEpisodes

ROTATIONS = ("none", "train_classes", "classes", "episode")


@dataclasses.dataclass(frozen=True)
class ClassImages:
    """Decoded images before any split, uint8 [I, C, H, W], ordered by class."""

    images: Tensor
    counts: list[int]  # number of images of each class
    names: list[str]
    #: Lines for the user about how the images were read.
    notes: list[str] = dataclasses.field(default_factory=list)
    #: Names of the classes of each split, if the files have splits; else {}.
    splits: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    #: `metalearn.data.files.pixel_hash` of each image before any resizing, int64 [I]; None: of the
    #: images as they are.
    hashes: Tensor | None = None

    def content_hash(self) -> str:
        """Return a hash of pixels, classes and their order, independent of the source files."""
        digest = hashlib.sha256(self.images.contiguous().numpy())  # type: ignore[arg-type]
        digest.update(repr((tuple(self.images.shape), self.counts, self.names)).encode())
        return digest.hexdigest()[:16]


def with_channels(x: Tensor, channels: int | None) -> Tensor:
    """Convert images [*, C, H, W] from grey to colour or the reverse; return others unchanged."""
    if {x.shape[-3], channels} != {1, 3}:
        return x
    if channels == 3:
        return x.expand(*x.shape[:-3], 3, *x.shape[-2:])
    # Luma, as Pillow computes it.
    red, green, blue = (x[..., channel : channel + 1, :, :].float() for channel in range(3))
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    return grey if x.is_floating_point() else grey.round().to(x.dtype)


def is_too_large(images: Tensor, device: torch.device) -> bool:
    """Return True if images need more than half of the free memory of a GPU."""
    return device.type == "cuda" and images.numel() > torch.cuda.mem_get_info(device)[0] / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageDataset(Dataset):
    """Settings that all datasets of images share."""

    reads_image_files: ClassVar[bool] = True
    #: Width of a pen stroke, as a share of the image's, if the images are drawn in dark ink.
    pen: ClassVar[float | None] = None

    #: "none"; "train_classes" or "classes" (each class becomes four, rotated by 0, 90, 180 and 270
    #: degrees, in training or everywhere); "episode" (each class is rotated at random in each
    #: episode). For the next two, see `RotatedClasses`.
    rotations: str = choice(*ROTATIONS)
    rotations_may_meet: bool = setting()
    rotations_share_drawings: bool = setting(default=True)
    #: Where the images are: "device", "host", or "auto": on a GPU if they need at most half of its
    #: free memory. Results do not depend on it.
    store: str = choice("auto", "device", "host", default="auto", role="machine")
    #: Classes of training: "given"; "clusters" of the embeddings of a run; or "random", of about
    #: equal size. Validation and test have the given ones.
    labels: str = choice("given", "clusters", "random", default="given", role="identity")
    #: Number of clusters or random classes.
    clusters: int = at_least(2, default=500, role="identity")
    #: Number of such groupings of all training images; an episode is in one.
    partitions: int = at_least(1, default=1, role="identity")
    #: Folder of the run whose embeddings are clustered.
    clusters_of: str | None = setting(default=None, role="identity")
    #: 1 or 3, to convert the images for a network; None for those of the dataset.
    channels: int | None = given_by_run(None)
    #: Leave images in [0, 1], for a network that standardises them itself.
    raw: bool = given_by_run(False)

    def to_array(self, image: Image.Image) -> np.ndarray:
        """Convert an image to the dataset's channels and size, uint8 [C, H, W]."""
        raise NotImplementedError

    def class_data(
        self,
        pictures: ClassImages,
        splits: dict[str, list[str]],
        device: torch.device,
        standardise: bool = False,
        superclass_of: Mapping[str, str] = {},
    ) -> ClassData:
        """Open a dataset of decoded images; splits and superclasses as in `class_indices`.

        With `standardise`, the mean of each channel over the training images is subtracted, and the
        standard deviation divides the rest.
        """
        images = with_channels(pictures.images, self.channels)
        is_on_host = self.store == "host" or (self.store == "auto" and is_too_large(images, device))
        where = torch.device("cpu") if is_on_host else device
        views: dict[str, ClassView] = {}
        indices = class_indices(pictures.names, pictures.counts, splits, where, superclass_of)
        for split, index in indices.items():
            if self.rotations in ("classes", f"{split}_classes"):
                views[split] = RotatedClasses(
                    index, self.rotations_may_meet, self.rotations_share_drawings
                )
            else:
                kind = RotatedEpisodes if self.rotations == "episode" else ClassView
                views[split] = kind(index)
        shift, scale = torch.zeros(images.shape[1]), torch.ones(images.shape[1])
        if standardise and not self.raw:
            shift, scale = moments(images, views["train"].index.rows.cpu().unique())
        shift, scale = (part.view(-1, 1, 1).to(device) for part in (shift, scale))
        store = ImageStore(images.to(where), shift, 1 / scale)
        stores = {
            name: dataclasses.replace(store, has_rotations=view.has_rotations)
            for name, view in views.items()
        }
        standardisation = {
            "shift": store.shift.flatten().tolist(),
            "scale": store.scale.flatten().tolist(),
        }
        content = pictures.content_hash()
        return ClassData(
            stores, views, content, standardisation, pictures.hashes, is_on_host=is_on_host
        )


def moments(images: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [C] of x / 255, exact: from counts of the 256 values."""
    value = torch.arange(256, dtype=torch.float64) / 255
    columns = []
    for channel in range(images.shape[1]):
        weight = torch.bincount(images[rows, channel].flatten(), minlength=256).double()
        weight /= weight.sum()
        mean = (weight * value).sum()
        columns.append((mean, (weight * (value - mean).square()).sum().sqrt()))
    shift, scale = (torch.stack(column).float() for column in zip(*columns, strict=True))
    if (scale == 0).any():
        logging.getLogger(__name__).warning("a colour channel is constant over the training images")
    return shift, scale.clamp_min(1e-3)
