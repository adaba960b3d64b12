"""Operators of blocks that end in 2 x 2 max-pooling; conventions as in `ops`.

The pooling comes before normalisation and activation, which then compute a quarter of the values.
These operators have first derivatives only.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.engine.kernels import build
from metalearn.engine.kernels.ops import (
    PIXELS,
    activate,
    call_c,
    define,
    expanded,
    images,
    in_parts,
    masked,
    summed,
)


def _pooled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Pool maps [.., B, H, W, C]; return the largest values and their places, uint8 in 0 .. 3."""
    best, index = (
        one.permute(0, 2, 3, 1).contiguous().unflatten(0, x.shape[:-3])
        for one in F.max_pool2d(images(x), 2, return_indices=True)
    )
    place = index - _corners(best, x.shape[-2])
    return best, place.sub_((place > 1) * (x.shape[-2] - 2)).to(torch.uint8)


def _corners(y: Tensor, width: int) -> Tensor:
    """Return the index, in maps of a width, of the first value of each window [H, W, 1] of y."""
    rows, columns = (torch.arange(size, device=y.device) * 2 for size in y.shape[-3:-1])
    return (rows[:, None] * width + columns)[..., None]


def unpooled(g: Tensor, index: Tensor, height: int, width: int) -> Tensor:
    """Return maps [.., B, height, width, C] with values g where a pooling took its own, else 0."""
    flat = index.long().add_((index > 1) * (width - 2)).add_(_corners(g, width))
    like = images(g.new_empty(*g.shape[:-3], height, width, g.shape[-1]))
    x = torch.ops.aten.max_pool2d_with_indices_backward(
        images(g), like, (2, 2), (2, 2), (0, 0), (1, 1), False, images(flat)
    )
    return x.permute(0, 2, 3, 1).contiguous().unflatten(0, g.shape[:-3])


def _pool_shape(y: Tensor, out: int = 0) -> build.Shape:
    return build.Shape(*y.shape[-4:], out, 0, 0)


def _norm_pool(
    y: Tensor, g: Tensor, b: Tensor, eps: float, slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if g.dim() != b.dim():
        g, b = (value.expand(*y.shape[:-4], y.shape[-1]) for value in (g, b))
    y, g, b = y.contiguous(), g.contiguous(), b.contiguous()
    batch, height, width, channels = y.shape[-4:]
    a = y.new_empty(*y.shape[:-4], batch, height // 2, width // 2, channels)
    p, index = torch.empty_like(a), torch.empty_like(a, dtype=torch.uint8)
    mean, var = (y.new_empty(*y.shape[:-4], channels) for _ in range(2))
    tasks, tensors = y.shape[:-4].numel(), (y, g, b, a, p, index, mean, var)

    def call(first: int, end: int) -> None:
        call_c("norm_pool", *tensors, tasks, int(g.dim() == 1), _pool_shape(y), first, end,
               eps, slope)  # fmt: skip

    in_parts(call, tasks, channels, 16)
    return a, p, index, mean, var


@define(
    "norm_pool(Tensor y, Tensor g, Tensor b, float eps, float slope) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _norm_pool,
)
def norm_pool(
    y: Tensor, g: Tensor, b: Tensor, eps: float, slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Normalise y [.., B, H, W, C], apply scale, shift and activation, pool 2 x 2 windows.

    The pooling is first: it takes the smallest value where the scale g is negative.

    Returns:
        a = act(xh g + b) of the values that are taken, p; both [.., B, H // 2, W // 2, C]; the
        place of each in its window, uint8, like a; mean and variance [.., C].
    """
    sign = expanded(torch.where(g >= 0, 1.0, -1.0).to(y.dtype), y)
    best, index = _pooled(y * sign)
    p, mean = best * sign, y.mean(PIXELS)
    centred = y - expanded(mean, y)
    var = centred.mul_(centred).mean(PIXELS)
    z = (p - expanded(mean, y)) * expanded(torch.rsqrt(var + eps) * g, y) + expanded(b, y)
    return activate(z, slope), p, index, mean, var


def _norm_pool_vjp(
    ga: Tensor, gm: Tensor, gv: Tensor, g: Tensor, y: Tensor, a: Tensor, p: Tensor, index: Tensor,
    mean: Tensor, var: Tensor, eps: float, slope: float, keep: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = [value.contiguous() for value in (ga, gm, gv, g, y, a, p, index, mean, var)]
    gy, gg, gb = torch.empty_like(tensors[4]), torch.empty_like(mean), torch.empty_like(mean)
    tasks, lead = mean.shape[:-1].numel(), mean.dim() - 1

    def call(first: int, end: int) -> None:
        call_c("norm_pool_vjp", *tensors, gy, gg, gb, tasks, int(g.dim() == 1), _pool_shape(y),
               first, end, eps, slope)  # fmt: skip

    in_parts(call, tasks, y.shape[-1], 16)
    return gy, summed(gg, lead, keep), summed(gb, lead, keep)


@define(
    "norm_pool_vjp(Tensor ga, Tensor gm, Tensor gv, Tensor g, Tensor y, Tensor a, Tensor p, "
    "Tensor index, Tensor mean, Tensor var, float eps, float slope, int keep) "
    "-> (Tensor, Tensor, Tensor)",
    _norm_pool_vjp,
)
def norm_pool_vjp(
    ga: Tensor, gm: Tensor, gv: Tensor, g: Tensor, y: Tensor, a: Tensor, p: Tensor, index: Tensor,
    mean: Tensor, var: Tensor, eps: float, slope: float, keep: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of `norm_pool` by y, g and b, given those by a, mean and var."""
    m, count = masked(ga, a, slope), y.shape[-4:-1].numel()
    rate = torch.rsqrt(var + eps)
    gb, along = m.sum(PIXELS), (m * (p - expanded(mean, y))).sum(PIXELS)
    scale = g * rate
    shift, slant = (gm - scale * gb) / count, (2 * gv - scale * along * rate * rate) / count
    gy = unpooled(m * expanded(scale, y), index, *y.shape[-3:-1])
    gy.addcmul_(y, expanded(slant, y)).add_(expanded(shift - slant * mean, y))
    lead = mean.dim() - 1
    return gy, summed(along * rate, lead, keep), summed(gb, lead, keep)


def _maps(x: Tensor, height: int, width: int) -> Tensor:
    """Return rows [.., B H W, K] as [.., B, H, W, K]."""
    return x.unflatten(-2, (-1, height, width))


def _affine_pool(
    x: Tensor, w: Tensor, height: int, width: int, slope: float
) -> tuple[Tensor, Tensor]:
    x, w = _maps(x.contiguous(), height, width), w.contiguous()
    a = x.new_empty(*x.shape[:-3], height // 2, width // 2, w.shape[-1])
    index = torch.empty_like(a, dtype=torch.uint8)
    tasks = x.shape[:-4].numel()

    def call(first: int, end: int) -> None:
        at, *to = (value.narrow(-4, first, end - first) for value in (x, a, index))
        call_c("affine_pool", at, w, *to, tasks, int(w.dim() == 2), _pool_shape(at, w.shape[-1]),
               slope)  # fmt: skip

    in_parts(call, tasks, x.shape[-4])
    return a, index


@define(
    "affine_pool(Tensor x, Tensor w, int height, int width, float slope) -> (Tensor, Tensor)",
    _affine_pool,
)
def affine_pool(
    x: Tensor, w: Tensor, height: int, width: int, slope: float
) -> tuple[Tensor, Tensor]:
    """Return the activation of x [.., B H W, K] @ w [.., K, O], pooled over 2 x 2 windows.

    Returns:
        [.., B, H // 2, W // 2, O], and the place of each value in its window, uint8.
    """
    best, index = _pooled(_maps(x @ w, height, width))
    return activate(best, slope), index


def _affine_pool_weight(
    x: Tensor, g: Tensor, a: Tensor, index: Tensor, height: int, width: int, slope: float,
    keep: int,
) -> Tensor:  # fmt: skip
    x = _maps(x.contiguous(), height, width)
    g, a, index = g.contiguous(), a.contiguous(), index.contiguous()
    lead = x.shape[:-4] if keep else ()
    tasks = x.shape[:-4].numel()

    def call(first: int, end: int) -> Tensor:
        own = [value.narrow(-4, first, end - first) for value in (x, g, a, index)]
        gw = x.new_empty(*lead, x.shape[-1], g.shape[-1])
        call_c("affine_pool_weight", *own, gw, tasks, int(not keep),
               _pool_shape(own[0], g.shape[-1]), slope)  # fmt: skip
        return gw

    gw = functools.reduce(torch.add, in_parts(call, tasks, x.shape[-4]))
    return summed(gw, len(lead), keep)


@define(
    "affine_pool_weight(Tensor x, Tensor g, Tensor a, Tensor index, int height, int width, "
    "float slope, int keep) -> Tensor",
    _affine_pool_weight,
)
def affine_pool_weight(
    x: Tensor, g: Tensor, a: Tensor, index: Tensor, height: int, width: int, slope: float,
    keep: int,
) -> Tensor:  # fmt: skip
    """Return the gradient of `affine_pool` by w [.., K, O], given that by its output a."""
    dense = unpooled(masked(g, a, slope), index, height, width).flatten(-4, -2)
    return summed(x.mT @ dense, x.dim() - 2, keep)
