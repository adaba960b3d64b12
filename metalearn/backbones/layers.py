"""What the backbones share: initial weights and activations."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn import random

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.01),
    "tanh": torch.tanh,
}


def init_weight(key: Tensor, *shape: int) -> Tensor:
    """A normal weight [out, in, ...] with variance 2 / fan_in (He et al. 2015)."""
    return random.normal(key, shape) * math.sqrt(2 / math.prod(shape[1:]))
