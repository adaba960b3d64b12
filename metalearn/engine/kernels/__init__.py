"""Convolution, normalisation and activation of many tasks at once, with derivatives of them.

`ops`, `convolutions` and `pooling` have the operators, `functions` and `pooled` their derivatives,
`build` compiles their C implementation.
"""

import torch
from torch import Tensor

from metalearn.engine.kernels import build, functions, pooled


def weight_layout(weight: Tensor) -> Tensor:
    """Return filters [O, C, K, K] with the memory layout of the operators.

    In C it is [K, K, C, O]; in torch, in which most convolutions are plain ones, [O, K, K, C].
    """
    if build.library() is None:
        return weight.contiguous(memory_format=torch.channels_last)
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
    if not _is_first(w):
        y = functions.conv(x.permute(0, 2, 3, 1), w, stride)
        return functions.norm(y, scale, shift, eps, slope)[0].permute(0, 3, 1, 2)
    patches, folded, _, _ = _folded(x, w, scale, shift, stride, eps)
    height, width = (-(-size // stride) for size in x.shape[-2:])
    y = functions.affine(patches, folded, None, slope)
    return y.unflatten(0, (len(x), height, width)).permute(0, 3, 1, 2)


def pooled_block(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, eps: float, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `block` with stride 1, then 2 x 2 max-pooling; it has first derivatives only.

    Arguments as in `block`.

    Returns:
        Outputs [B, O, H // 2, W // 2], and mean and variance [O] of the convolution's outputs.
    """
    w = weight.permute(2, 3, 1, 0)
    if _is_first(w):
        patches, folded, mean, var = _folded(x, w, scale, shift, 1, eps)
        y = pooled.affine_pool(patches, folded, *x.shape[-2:], slope)[0]
    else:
        y = functions.conv(x.permute(0, 2, 3, 1), w, 1)
        y, _, _, mean, var = pooled.norm_pool(y, scale, shift, eps, slope)
    return y.permute(0, 3, 1, 2), mean, var


def _is_first(w: Tensor) -> bool:
    """Return True if filters [K, K, C, O] have few inputs per output, as mostly for images."""
    return 2 * w[..., 0].numel() <= w.shape[-1]


def _folded(
    x: Tensor, w: Tensor, scale: Tensor, shift: Tensor, stride: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return convolution and normalisation as one product with the patches.

    Mean and covariance of the patches give the statistics of the outputs. In float64: float32 cost
    5% of a gradient.

    Returns:
        Patches [M, K + 1], a matrix [K + 1, O], and mean and variance [O] of the outputs.
    """
    patches = functions.patches(x.permute(0, 2, 3, 1), w.shape[0], stride)
    mean, covariance = (moment[..., :-1] for moment in functions.moments(patches))
    filters = w.flatten(0, 2).double()
    variance = (filters * (covariance[:-1] @ filters)).sum(0)
    centre = mean @ filters
    rate = scale.double() * torch.rsqrt(variance + eps)
    folded = torch.cat([filters * rate, (shift - centre * rate)[None]]).to(x.dtype)
    return patches, folded, centre.to(x.dtype), variance.to(x.dtype)
