"""Glyphs: procedural handwriting, generated in seconds without any download.

Each class is a random set of pen strokes (Bezier curves). Each of its images is the same pen path
with jittered control points, a random affine map and pen width, rendered with anti-aliasing.
"""

import dataclasses
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metalearn.config.fields import at_least, choice, setting
from metalearn.data.class_splits import random_split
from metalearn.data.classes import ClassData
from metalearn.data.files import cached, ink
from metalearn.data.images import ClassImages, ImageDataset
from metalearn.tasks import prng

_POINTS = 28  # of the pen path, per stroke
_STROKES = 4  # at most, per class
_MAX_PIXELS = 50 * 20 * 28**2  # rendered at a time; limits memory to about 700 MB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Glyphs(ImageDataset):
    """Generated handwriting.

    `jitter` scales all deviations from the class: 1 is legible, 0 makes identical images.
    """

    pen: ClassVar[float | None] = 0.075

    num_classes: int = at_least(20)
    drawings: int = at_least(2)
    image_size: int = at_least(8)
    jitter: float = at_least(0)
    glyph_seed: int = setting()
    split: str = choice("random")
    split_seed: int = setting()
    fractions: list[float] = at_least(0)

    def open(self, data_dir: Path, cache_dir: Path, device: torch.device) -> ClassData:
        size = (self.num_classes, self.drawings, self.image_size)
        settings = ("3", *size, self.jitter, self.glyph_seed)
        pictures = cached(cache_dir, "glyphs", settings, self._render)
        splits = random_split(pictures.names, self.fractions, self.split_seed)
        return self.class_data(pictures, splits, device)

    def to_array(self, image: Image.Image) -> np.ndarray:
        return ink(image, self.image_size)

    def _render(self) -> ClassImages:
        keys = prng.fold_in(prng.key_of(self.glyph_seed), torch.arange(self.num_classes))
        num_together = max(1, min(50, _MAX_PIXELS // (self.drawings * self.image_size**2)))
        images = torch.cat([self._draw(chunk) for chunk in keys.split(num_together)])
        names = [f"glyph{index:05d}" for index in range(self.num_classes)]
        return ClassImages(images, [self.drawings] * self.num_classes, names)

    def _draw(self, key_C: Tensor) -> Tensor:
        """Render the classes of these keys: uint8 [C * drawings, 1, H, W]."""
        classes, drawings, jitter = len(key_C), self.drawings, self.jitter

        def noise(number: int, *shape: int) -> Tensor:
            return prng.normal(prng.fold_in(key_C, number), shape)

        # Coordinates are in [-1, 1]. A class has 2 to 4 strokes of 4 control points.
        starts = prng.uniform(prng.fold_in(key_C, 0), (_STROKES, 1, 2)) * 1.4 - 0.7
        control = (
            starts + torch.cat([torch.zeros_like(starts), 0.55 * noise(1, _STROKES, 3, 2)], 2)
        ).clamp(-0.8, 0.8)
        num_strokes = 2 + prng.integers(prng.fold_in(key_C, 2), (1,), _STROKES - 1)

        # Each image jitters the control points and applies an affine map close to the identity.
        control = control[:, None] + 0.06 * jitter * noise(3, drawings, _STROKES, 4, 2)
        affine = torch.eye(2) + 0.12 * jitter * noise(4, drawings, 2, 2)
        shift = 0.07 * jitter * noise(5, drawings, 1, 2)
        width = (0.075 * (1 + 0.15 * jitter * noise(6, drawings))).clamp(0.05, 0.12)

        t = torch.linspace(0, 1, _POINTS)
        bernstein = torch.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], 1)
        path = torch.einsum("pk,cdskx->cdspx", bernstein, control)
        absent = torch.arange(_STROKES) >= num_strokes
        path = path.masked_fill(absent[:, None, :, None, None], 9.0).flatten(2, 3)
        path = (path @ affine.transpose(-1, -2) + shift).flatten(0, 1).double()

        # The distance of each pixel to the pen path gives a soft edge, one pixel wide.
        axis = torch.linspace(-1, 1, self.image_size, dtype=torch.float64)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(-1, 2)
        pixels = grid.expand(len(path), -1, 2)
        distance = torch.cdist(pixels, path, compute_mode="donot_use_mm_for_euclid_dist").amin(-1)
        edge = 2 / self.image_size
        ink = ((width.view(-1, 1) - distance) / edge + 0.5).clamp(0, 1)
        shape = (classes * drawings, 1, self.image_size, self.image_size)
        return (ink * 255).round().to(torch.uint8).view(shape)
