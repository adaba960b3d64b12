"""Shared parts of backbones: initial weights, activations, normalised convolutions, and noise."""

import math
from collections.abc import Callable, Iterable

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
#: Slope for negative values of the activations that can be fused with a normalisation.
_SLOPES = {"relu": 0.0, "leaky_relu": 0.01}


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, kernels: Kernels
) -> Tensor:
    """Convolve x [B, C, H, W] with filters [O, C, K, K], K odd; at stride 1 the size remains.

    `kernels` selects the implementation, which does not change the result.
    """
    size = weight.shape[-1]
    if kernels.own is not None:
        output = kernels.own.convolution(x, weight, stride)
        return output if bias is None else output + bias[:, None, None]
    if kernels.convolution == "plain":
        return F.conv2d(x, weight, bias, stride, padding=size // 2)
    height, width = (-(-extent // stride) for extent in x.shape[-2:])
    columns = F.unfold(x, size, padding=size // 2, stride=stride)
    output = (weight.flatten(1) @ columns).unflatten(-1, (height, width))
    return output if bias is None else output + bias[:, None, None]


def init_weight(key: Tensor, *shape: int) -> Tensor:
    """Draw a normal weight [out, in, ...] with variance 2 / fan_in (He et al. 2015)."""
    return prng.normal(key, shape) * math.sqrt(2 / math.prod(shape[1:]))


def init_conv_norms(
    key: Tensor, layers: Iterable[tuple[str, int, int, int]]
) -> tuple[Params, Params]:
    """Initialise convolutions (name, O, C, K) without bias, and their normalisations.

    Return parameters and population statistics.
    """
    params: Params = {}
    population: Params = {}
    for number, (name, out, channels, size) in enumerate(layers):
        weight = init_weight(prng.fold_in(key, number), out, channels, size, size)
        affine, statistics = normalisation.init(f"norm{name}", out, key.device)
        params |= {f"conv{name}.weight": weight} | affine
        population |= statistics
    return params, population


def conv_norm(norm: Normaliser, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """Apply the named convolution to x [B, C, H, W], then its normalisation."""
    return conv_norm_act(norm, name, x, stride, None)


def conv_norm_act(
    norm: Normaliser, name: str, x: Tensor, stride: int, activation: str | None, pool: bool = False
) -> Tensor:
    """Apply the named convolution to x [B, C, H, W], its normalisation if any, an activation.

    `pool`: whether 2 x 2 max-pooling follows.
    """
    weight, bias = norm.params[f"conv{name}.weight"], norm.params.get(f"conv{name}.bias")
    if pool and stride == 1 and bias is None and norm.kernels.pooled is not None:
        own_statistics = norm.of_batch(f"norm{name}", weight.shape[0], may_collect=True)
        if own_statistics is not None:
            slope = _SLOPES.get(activation or "", 1.0)
            x, mean, var = norm.kernels.pooled(x, weight, *own_statistics, norm.eps, slope)
            norm.see(f"norm{name}", mean, var)
            return x if activation is None or activation in _SLOPES else ACTIVATIONS[activation](x)
    affine = norm.of_batch(f"norm{name}", weight.shape[0])
    if affine is not None and bias is None and norm.kernels.own is not None:
        slope = _SLOPES.get(activation or "", 1.0)
        x = norm.kernels.own.block(x, weight, *affine, stride, norm.eps, slope)
        is_done = activation in _SLOPES
    else:
        x = norm(f"norm{name}", convolution(x, weight, bias, stride, norm.kernels))
        is_done = False
    x = x if activation is None or is_done else ACTIVATIONS[activation](x)
    return F.max_pool2d(x, 2) if pool else x


def dropout(x: Tensor, rate: float, key: Tensor) -> Tensor:
    """Zero a share `rate` of entries, scale the rest by 1 / (1 - rate) (Srivastava et al. 2014)."""
    mask = prng.uniform(key, tuple(x.shape)) >= rate
    return x * mask / (1 - rate)


def drop_block(x: Tensor, rate: float, size: int, key: Tensor) -> Tensor:
    """Zero random squares of each map [B, C, H, W] and rescale the rest to preserve the mean.

    Ghiasi et al. (2018), algorithm 1. `rate` is the approximate fraction of entries to zero; the
    side of a square is clipped to min(H, W).
    """
    batch, channels, height, width = x.shape
    size = min(size, height, width)
    positions = (height - size + 1, width - size + 1)
    corner_rate = rate * height * width / (size**2 * positions[0] * positions[1])
    corners = prng.uniform(key, (batch, channels, *positions)) < corner_rate
    mask = 1 - F.max_pool2d(F.pad(corners.to(x.dtype), [size - 1] * 4), size, stride=1)
    return x * mask * (mask.numel() / mask.sum().clamp_min(1))


def masked_mean(z: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean [B, D] of the tokens z [B, L, D] that a mask [B, L] has; 0 without any."""
    weight = mask.to(z.dtype).unsqueeze(-1)
    return (z * weight).sum(1) / weight.sum(1).clamp_min(1)
