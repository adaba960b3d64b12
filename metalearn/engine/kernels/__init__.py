"""Convolution, normalisation and activation of many tasks at once, with derivatives of them.

`ops` has the operators, `functions` their derivatives, `build` compiles their C implementation.
"""

import torch
from torch import Tensor

from metalearn.engine.kernels import functions


def weight_layout(weight: Tensor) -> Tensor:
    """Return filters [O, C, K, K] with the memory layout of the operators, [K, K, C, O]."""
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def convolution(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolve x [B, C, H, W] with weight [O, C, K, K], K odd, padding K // 2."""
    y = functions.conv(x.permute(0, 2, 3, 1), weight.permute(2, 3, 1, 0), stride)
    return y.permute(0, 3, 1, 2)


def block(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: int,
    eps: float,
    slope: float,
) -> Tensor:
    """Convolve, normalise by the statistics of the batch, and activate.

    Args:
        x: Inputs [B, C, H, W].
        weight: Filters [O, C, K, K], K odd.
        scale: [O], of the normalisation.
        shift: [O].
        stride: Of the convolution.
        eps: Added to variances.
        slope: Of the activation for negative values: 0 for ReLU, 1 for none.

    Returns:
        Outputs [B, O, H', W'].
    """
    w = weight.permute(2, 3, 1, 0)
    if 2 * w[..., 0].numel() <= weight.shape[0]:
        return _first_block(x, w, scale, shift, stride, eps, slope)
    y = functions.conv(x.permute(0, 2, 3, 1), w, stride)
    return functions.norm(y, scale, shift, eps, slope)[0].permute(0, 3, 1, 2)


def _first_block(
    x: Tensor, w: Tensor, scale: Tensor, shift: Tensor, stride: int, eps: float, slope: float
) -> Tensor:
    """Compute `block` for few inputs per output, so mostly for images.

    Convolution and normalisation are one product with the patches, whose mean and covariance give
    the statistics of its outputs. In float64: float32 cost 5% of a gradient.
    """
    patches = functions.patches(x.permute(0, 2, 3, 1), w.shape[0], stride)
    mean, covariance = (moment[..., :-1] for moment in functions.moments(patches))
    filters = w.flatten(0, 2).double()
    variance = (filters * (covariance[:-1] @ filters)).sum(0)
    rate = scale.double() * torch.rsqrt(variance + eps)
    folded = torch.cat([filters * rate, (shift - mean @ filters * rate)[None]]).to(x.dtype)
    y = functions.affine(patches, folded, None, slope)
    height, width = (-(-size // stride) for size in x.shape[-2:])
    return y.unflatten(0, (len(x), height, width)).permute(0, 3, 1, 2)
