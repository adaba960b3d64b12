"""What the backbones share: initial weights and activations."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn import random
from metalearn.types import Kernels

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.01),
    "tanh": torch.tanh,
}


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, kernels: Kernels) -> Tensor:
    """x [B, C, H, W] convolved with weight [O, C, K, K], K odd, padded to keep its size at stride 1."""
    size = weight.shape[-1]
    if kernels.convolution == "plain":
        return F.conv2d(x, weight, bias, stride, padding=size // 2)
    height, width = (-(-extent // stride) for extent in x.shape[-2:])
    found = (weight.flatten(1) @ F.unfold(x, size, padding=size // 2, stride=stride)).unflatten(-1, (height, width))
    return found if bias is None else found + bias[:, None, None]


def init_weight(key: Tensor, *shape: int) -> Tensor:
    """A normal weight [out, in, ...] with variance 2 / fan_in (He et al. 2015)."""
    return random.normal(key, shape) * math.sqrt(2 / math.prod(shape[1:]))
