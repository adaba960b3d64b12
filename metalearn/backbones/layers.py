"""What the backbones share: initial weights, activations, convolutions with a normalisation, and noise."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.backbones import normalisation
from metalearn.backbones.normalisation import Normaliser
from metalearn.tasks import prng
from metalearn.tasks.types import Kernels, Params

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.01),
    "tanh": torch.tanh,
}


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, kernels: Kernels
) -> Tensor:
    """X [B, C, H, W] convolved with weight [O, C, K, K], K odd, padded to keep its size at stride 1."""
    size = weight.shape[-1]
    if kernels.convolution == "plain":
        return F.conv2d(x, weight, bias, stride, padding=size // 2)
    height, width = (-(-extent // stride) for extent in x.shape[-2:])
    found = (weight.flatten(1) @ F.unfold(x, size, padding=size // 2, stride=stride)).unflatten(
        -1, (height, width)
    )
    return found if bias is None else found + bias[:, None, None]


def init_weight(key: Tensor, *shape: int) -> Tensor:
    """A normal weight [out, in, ...] with variance 2 / fan_in (He et al. 2015)."""
    return prng.normal(key, shape) * math.sqrt(2 / math.prod(shape[1:]))


def init_conv_norm(
    name: str, key: Tensor, out: int, channels: int, size: int
) -> tuple[Params, Params]:
    """A convolution without a bias and the normalisation after it: parameters, population statistics."""
    affine, population = normalisation.init(f"norm{name}", out, key.device)
    return {f"conv{name}.weight": init_weight(key, out, channels, size, size)} | affine, population


def conv_norm(norm: Normaliser, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """Convolve x [B, C, H, W] by the layer of this name, and normalise."""
    return norm(
        f"norm{name}", convolution(x, norm.params[f"conv{name}.weight"], None, stride, norm.kernels)
    )


def dropout(x: Tensor, rate: float, key: Tensor) -> Tensor:
    """Each number zero with probability `rate`, the others scaled by 1 / (1 - rate) (Srivastava et al. 2014)."""
    kept = prng.uniform(key, tuple(x.shape)) >= rate
    return x * kept / (1 - rate)


def drop_block(x: Tensor, rate: float, size: int, key: Tensor) -> Tensor:
    """Squares of size x size in each map zero, about a share `rate` of all, the rest scaled to keep the mean (Ghiasi et al. 2018,
    algorithm 1).

    Args: x: [B, C, H, W]; size: at most H or W, whichever is less, else that.
    """
    batch, channels, height, width = x.shape
    size = min(size, height, width)
    places = (height - size + 1, width - size + 1)
    share = rate * height * width / (size**2 * places[0] * places[1])
    corners = prng.uniform(key, (batch, channels, *places)) < share
    dropped = F.max_pool2d(F.pad(corners.to(x.dtype), [size - 1] * 4), size, stride=1)
    kept = 1 - dropped
    return x * kept * (kept.numel() / kept.sum().clamp_min(1))
