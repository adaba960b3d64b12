"""The preprocessing of images of a pretrained network: resize, crop, standardise."""

from typing import NamedTuple

import torch.nn.functional as F
from PIL import Image
from torch import Tensor


class Preprocessing(NamedTuple):
    """Resize the shorter side to `resize`, crop a centred square of `size`, standardise.

    An image of `size` x `size` is only standardised. `interpolation` is "bilinear" or "bicubic",
    antialiased; `mean` and `std` are of the channels in [0, 1].
    """

    size: int
    resize: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return height and width after resizing, and top and left of the crop in it.

        They are rounded as in torchvision's `Resize` and `CenterCrop`.
        """
        short = min(height, width)
        height, width = (int(self.resize * side / short) for side in (height, width))
        return height, width, round((height - self.size) / 2), round((width - self.size) / 2)

    def crop(self, image: Image.Image) -> Image.Image:
        """Resize and crop an image."""
        if image.size == (self.size, self.size):
            return image
        height, width, top, left = self.box(image.height, image.width)
        image = image.resize((width, height), Image.Resampling[self.interpolation.upper()])
        return image.crop((left, top, left + self.size, top + self.size))

    def __call__(self, x: Tensor) -> Tensor:
        """Return network inputs [B, 3, size, size] for images in [0, 1], [B, 3, H, W]."""
        if x.shape[-2:] != (self.size, self.size):
            height, width, top, left = self.box(*x.shape[-2:])
            x = F.interpolate(x, (height, width), mode=self.interpolation, antialias=True)
            x = x[..., top : top + self.size, left : left + self.size].clamp(0, 1)
        mean, std = (x.new_tensor(value).view(-1, 1, 1) for value in (self.mean, self.std))
        return (x - mean) / std
