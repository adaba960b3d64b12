"""Define the augmentations that `augment.ops` chooses by name.

To add one, write a function here or in a plugin and add it to `AUGMENTATIONS`. It takes images in
[0, 1], float32 [B, C, H, W], and one key per image, int64 [B]. Further arguments are its settings;
an annotation such as `Annotated[int, at_least(0)]` has their bounds.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.config.fields import at_least
from metalearn.tasks import prng
from metalearn.tasks.store import Augmentation


def random_crop(x: Tensor, key: Tensor, padding: Annotated[int, at_least(0)] = 4) -> Tensor:
    """Pad with `padding` black pixels on each side and crop at random to the original size."""
    _, _, height, width = x.shape
    offsets = prng.integers(key, (2,), 2 * padding + 1)
    rows = offsets[:, :1] + torch.arange(height, device=x.device)
    columns = offsets[:, 1:] + torch.arange(width, device=x.device)
    images = torch.arange(len(x), device=x.device)[:, None, None]
    padded = F.pad(x, [padding] * 4).permute(0, 2, 3, 1)
    return padded[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def horizontal_flip(x: Tensor, key: Tensor) -> Tensor:
    """Flip left to right with probability 1/2."""
    return torch.where(prng.uniform(key, (1, 1, 1)) < 0.5, x.flip(-1), x)


AUGMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "random_crop": random_crop,
    "horizontal_flip": horizontal_flip,
}


def chain(ops: Mapping[str, tuple[Callable[..., Tensor], Mapping[str, Any]]]) -> Augmentation:
    """Compose augmentations in order, each with its own key.

    Args:
        ops: Maps each name to (function, settings).
    """

    def augment(x: Tensor, key: Tensor) -> Tensor:
        for number, (function, settings) in enumerate(ops.values()):
            x = function(x, prng.fold_in(key, number), **settings)
        return x

    return augment
