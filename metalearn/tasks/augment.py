"""Define the augmentations that `augment.ops` chooses by name.

To add one, write a function here or in a plugin and add it to `AUGMENTATIONS`. It takes inputs and
one key per input, int64 [B], and is a function of these alone. Inputs are images in [0, 1], float32
[B, C, H, W]; `takes` declares others. Further arguments are its settings; an annotation such as
`Annotated[int, at_least(0)]` has their bounds.
"""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.config.fields import at_least, between
from metalearn.tasks import prng
from metalearn.tasks.store import Augmentation

Function = Callable[..., Any]
Share = Annotated[float, between(0, 1)]
Pair = Annotated[tuple[float, float], between(0, 1)]
Angle = Annotated[float, between(0, 180)]
Zoom = Annotated[float, between(0, 0.9)]
Count = Annotated[int, at_least(1)]


def takes(*kinds: str) -> Callable[[Function], Function]:
    """Declare the kinds of input that a function accepts; without it, images."""

    def declare(function: Function) -> Function:
        function.input_kinds = kinds  # type: ignore[attr-defined]
        return function

    return declare


def input_kinds(function: Function) -> tuple[str, ...]:
    """Return the kinds of input that a function accepts."""
    kinds: tuple[str, ...] = getattr(function, "input_kinds", ("images",))
    return kinds


def random_crop(x: Tensor, key: Tensor, padding: Annotated[int, at_least(0)] = 4) -> Tensor:
    """Pad with `padding` black pixels on each side and crop at random to the original size."""
    _, channels, height, width = x.shape
    offsets = prng.integers(key, (2,), 2 * padding + 1)
    rows = offsets[:, :1] + torch.arange(height, device=x.device)
    columns = offsets[:, 1:] + torch.arange(width, device=x.device)
    pixels = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    pixels = pixels.flatten(1)[:, None].expand(-1, channels, -1)
    return F.pad(x, [padding] * 4).flatten(2).gather(2, pixels).view(x.shape)


def horizontal_flip(x: Tensor, key: Tensor) -> Tensor:
    """Flip left to right with probability 1/2."""
    return torch.where(prng.uniform(key, (1, 1, 1)) < 0.5, x.flip(-1), x)


def colour_jitter(
    x: Tensor, key: Tensor, brightness: Share = 0.4, contrast: Share = 0.4, saturation: Share = 0.4
) -> Tensor:
    """Change each by a factor between 1 - s and 1 + s, in this order (torchvision: at random)."""
    factors = 2 * prng.uniform(key, (3, 1, 1, 1)) - 1
    bright, contrasted, saturated = (
        1 + size * factors[:, i] for i, size in enumerate((brightness, contrast, saturation))
    )
    x = (x * bright).clamp_(0, 1)
    x = torch.lerp(grey(x).mean((-2, -1), keepdim=True), x, contrasted).clamp_(0, 1)
    return torch.lerp(grey(x), x, saturated).clamp_(0, 1)


def grey(x: Tensor) -> Tensor:
    """Return the luma of images, [B, 1, H, W]; the mean unless they have three channels."""
    weights = (0.299, 0.587, 0.114) if x.shape[1] == 3 else (1 / x.shape[1],) * x.shape[1]
    return sum(w * x[:, i : i + 1] for i, w in enumerate(weights))  # type: ignore[return-value]


def affine(
    x: Tensor, key: Tensor, degrees: Angle = 10.0, translate: Share = 0.1, scale: Zoom = 0.1
) -> Tensor:
    """Rotate by up to `degrees`, shift by a share of the size, zoom by 1 - scale to 1 + scale."""
    aspect = x.shape[-2] / x.shape[-1]
    # In float64, so that devices agree on where to read each pixel.
    turn, zoom, right, down = (2 * prng.uniform(key, (4,)).double() - 1).unbind(-1)
    angle, zoom = math.radians(degrees) * turn, 1 + scale * zoom
    cos, sin, shift = angle.cos() / zoom, angle.sin() / zoom, 2 * translate
    rows = [cos, -sin * aspect, shift * right, sin / aspect, cos, shift * down]
    grid = F.affine_grid(torch.stack(rows, -1).view(-1, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid.float(), align_corners=False).clamp_(0, 1)


def inside(x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Return which pixels of images [B, C, H, W] are in a box, given by four [B]: [B, 1, H, W]."""
    top, left, height, width = (part[:, None, None, None] for part in (top, left, height, width))
    rows = torch.arange(x.shape[-2], device=x.device)[:, None] - top
    columns = torch.arange(x.shape[-1], device=x.device) - left
    return (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)


def cutout(x: Tensor, key: Tensor, size: Count = 8, value: Share = 0.5) -> Tensor:
    """Fill a square around a random pixel (DeVries and Taylor 2017)."""
    down, right = prng.uniform(key, (2,)).unbind(-1)
    top, left = (down * x.shape[-2]).floor() - size // 2, (right * x.shape[-1]).floor() - size // 2
    side = torch.full_like(top, size)
    box = inside(x, top, left, side, side)
    return torch.where(box, value, x)


def random_erasing(
    x: Tensor, key: Tensor, probability: Share = 0.5, area: Pair = (0.02, 0.33), value: Share = 0.5
) -> Tensor:
    """Fill a box of a random share of the area, 0.3 to 3.3 times as high as wide (Zhong 2020)."""
    chance, share, shape, down, right = prng.uniform(key, (5,)).double().unbind(-1)
    pixels = (area[0] + (area[1] - area[0]) * share) * x.shape[-2] * x.shape[-1]
    ratios = 0.3 * (3.3 / 0.3) ** shape
    # A box that would be larger than the image in one direction becomes larger in the other one.
    height = torch.maximum((pixels * ratios).sqrt(), pixels / x.shape[-1])
    height = height.round().clamp(1, x.shape[-2])
    width = (pixels / height).round().clamp_max(x.shape[-1])
    top, left = (down * (x.shape[-2] - height + 1)).floor(), right * (x.shape[-1] - width + 1)
    box = inside(x, top, left.floor(), height, width)
    return torch.where(box & (chance < probability)[:, None, None, None], value, x)


@takes("features")
def gaussian_noise(x: Tensor, key: Tensor, std: Annotated[float, at_least(0)] = 0.1) -> Tensor:
    """Add normal noise to feature vectors [B, *X]."""
    return x + std * prng.normal(key, tuple(x.shape[1:]))


@takes("tokens")
def token_dropout(x: Tensor, key: Tensor, probability: Share = 0.1) -> Tensor:
    """Replace tokens, int64 [B, L], by padding."""
    return torch.where(prng.uniform(key, tuple(x.shape[1:])) < probability, 0, x)


AUGMENTATIONS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        random_crop, horizontal_flip, colour_jitter, affine, cutout, random_erasing, gaussian_noise,
        token_dropout,
    )
}  # fmt: skip


def chain(ops: Mapping[str, tuple[Callable[..., Tensor], Mapping[str, Any]]]) -> Augmentation:
    """Compose augmentations in order, each with its own key: (function, settings) by name."""

    def augment(x: Tensor, key: Tensor) -> Tensor:
        for number, (function, settings) in enumerate(ops.values()):
            x = function(x, prng.fold_in(key, number), **settings)
        return x

    return augment
