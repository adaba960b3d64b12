"""Operators of convolutions and of the patches of images; conventions as in `ops`.

In torch, a convolution is a plain one of channels-last images, task by task if the weights differ,
or a product with patches if few pixels share the weights.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.engine.kernels import build
from metalearn.engine.kernels.ops import call_c, define, images, in_parts, summed

#: Pixels of outputs with the same weights, from which a plain convolution is faster than a product.
_LARGE = 200


def _patches(x: Tensor, size: int, stride: int) -> Tensor:
    x = x.contiguous()
    height, width = (-(-extent // stride) for extent in x.shape[-3:-1])
    *lead, batch, _, _, channels = x.shape
    y = x.new_empty(*lead, batch * height * width, size * size * channels + 1)
    call_c("patches", x, y, build.Shape(x.shape[:-3].numel(), *x.shape[-3:], 0, size, stride))
    return y


@define("patches(Tensor x, int size, int stride) -> Tensor", _patches)
def patches(x: Tensor, size: int, stride: int) -> Tensor:
    """Return the surroundings of each output, and a 1: [.., B, H, W, C] -> [.., M, K K C + 1]."""
    columns = _columns(x, size, stride)
    return torch.cat([columns, columns.new_ones(*columns.shape[:-1], 1)], -1)


def _columns(x: Tensor, size: int, stride: int) -> Tensor:
    """Return the surroundings of each output: [.., B, H, W, C] -> [.., M, K K C]."""
    pad = size // 2
    x = F.pad(x, (0, 0, pad, pad, pad, pad))
    x = x.unfold(-3, size, stride).unfold(-3, size, stride).movedim(-3, -1)
    return x.flatten(-3).flatten(-4, -2)


def _geometry(x: Tensor, w: Tensor, stride: int) -> tuple[int, int, build.Shape]:
    """Return T, whether tasks share the weights, and the shape, for inputs x and weights w."""
    batch, height, width, _ = x.shape[-4:]
    size, _, channels, out = w.shape[-4:]
    tasks = x.shape[:-4].numel()
    shape = build.Shape(batch, height, width, channels, out, size, stride)
    return tasks, int(w.dim() == 4), shape


def _part(shape: build.Shape, first: int, end: int) -> build.Shape:
    """Return the shape of some images."""
    return build.Shape(end - first, shape.H, shape.W, shape.C, shape.O, shape.K, shape.stride)


def _conv(x: Tensor, w: Tensor, stride: int) -> Tensor:
    x, w = x.contiguous(), w.contiguous()
    height, width = (-(-size // stride) for size in x.shape[-3:-1])
    y = x.new_empty(*x.shape[:-3], height, width, w.shape[-1])
    tasks, shared, shape = _geometry(x, w, stride)

    def call(first: int, end: int) -> None:
        at, to = (value.narrow(-4, first, end - first) for value in (x, y))
        call_c("conv", at, w, to, tasks, shared, _part(shape, first, end))

    in_parts(call, tasks, shape.B)
    return y


@define("conv(Tensor x, Tensor w, int stride) -> Tensor", _conv)
def conv(x: Tensor, w: Tensor, stride: int) -> Tensor:
    """Convolve x [.., B, H, W, C] with w [.., K, K, C, O], K odd, padding K // 2."""
    size = w.shape[-4]
    height, width = (-(-extent // stride) for extent in x.shape[-3:-1])
    if _sharing(x, w) * height * width > _LARGE:

        def one(x: Tensor, w: Tensor) -> Tensor:
            return F.conv2d(images(x), _filters(w), None, stride, size // 2).permute(0, 2, 3, 1)

        return _each(one, x, w) if w.dim() > 4 else one(x, w).unflatten(0, x.shape[:-3])
    y = _columns(x, size, stride) @ w.flatten(-4, -2)
    return y.unflatten(-2, (x.shape[-4], height, width))


def _sharing(x: Tensor, w: Tensor) -> int:
    """Return the number of images x that share the weights w."""
    return x.shape[:-3].numel() if w.dim() == 4 else x.shape[-4]


def _filters(w: Tensor) -> Tensor:
    """Return weights [K, K, C, O] as [O, C, K, K]."""
    return w.permute(3, 2, 0, 1)


def _each(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return `function` of each task's part of tensors with the same leading axes."""
    lead = tensors[0].shape[: tensors[0].dim() - 4]
    result = None
    parts = zip(*(one.flatten(0, -5).unbind() for one in tensors), strict=True)
    for index, part in enumerate(parts):
        own = function(*part)  # copied while it is in the cache
        if result is None:
            size, strides = (lead.numel(), *own.shape), (own.numel(), *own.stride())
            result = torch.empty_strided(size, strides, dtype=own.dtype, device=own.device)
        result[index] = own
    assert result is not None
    return result.unflatten(0, lead)


def _backward(gy: Tensor, x: Tensor, w: Tensor, stride: int, by_input: bool) -> Tensor:
    """Return a gradient of F.conv2d of x [B, C, H, W] with w [O, C, K, K]."""
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        gy, x, w, None, (stride,) * 2, (w.shape[-1] // 2,) * 2, (1, 1), False, (0, 0), 1,
        (by_input, not by_input, False),
    )  # fmt: skip
    return gradients[0] if by_input else gradients[1]


def _conv_input(gy: Tensor, w: Tensor, height: int, width: int, stride: int) -> Tensor:
    gy, w = gy.contiguous(), w.contiguous()
    gx = gy.new_empty(*gy.shape[:-3], height, width, w.shape[-2])
    tasks, shared, shape = _geometry(gx, w, stride)

    def call(first: int, end: int) -> None:
        at, to = (value.narrow(-4, first, end - first) for value in (gy, gx))
        call_c("conv_input", at, w, to, tasks, shared, _part(shape, first, end))

    in_parts(call, tasks, shape.B)
    return gx


@define("conv_input(Tensor gy, Tensor w, int height, int width, int stride) -> Tensor", _conv_input)
def conv_input(gy: Tensor, w: Tensor, height: int, width: int, stride: int) -> Tensor:
    """Return the gradient of `conv` by x [.., B, height, width, C]."""
    size, (rows, columns) = w.shape[-4], gy.shape[-3:-1]
    if _sharing(gy, w) * rows * columns > _LARGE:

        def one(gy: Tensor, w: Tensor) -> Tensor:
            x = images(gy.new_empty(*gy.shape[:-3], height, width, w.shape[-2]))
            return _backward(images(gy), x, _filters(w), stride, True).permute(0, 2, 3, 1)

        return _each(one, gy, w) if w.dim() > 4 else one(gy, w).unflatten(0, gy.shape[:-3])
    parts = (gy.flatten(-4, -2) @ w.flatten(-4, -2).mT).unflatten(-1, (size, size, -1))
    parts = parts.unflatten(-4, gy.shape[-4:-1])
    pad, tiles = size // 2, -(-size // stride)
    padded = gy.new_zeros(
        *gy.shape[:-3], (rows + tiles) * stride, (columns + tiles) * stride, w.shape[-2]
    )
    for i in range(0, size, stride):
        for j in range(0, size, stride):  # parts that do not overlap
            part = parts[..., i : i + stride, j : j + stride, :].transpose(-4, -3)
            to = padded[..., i : i + rows * stride, j : j + columns * stride, :]
            to = to.unflatten(-2, (columns, stride)).unflatten(-4, (rows, stride))
            to[..., : part.shape[-4], :, : part.shape[-2], :].add_(part)
    return padded[..., pad : pad + height, pad : pad + width, :].contiguous()


def _conv_weight(x: Tensor, gy: Tensor, size: int, stride: int, keep: int) -> Tensor:
    x, gy = x.contiguous(), gy.contiguous()
    lead = x.shape[:-4] if keep else ()
    gw = x.new_empty(*lead, size, size, x.shape[-1], gy.shape[-1])
    tasks, _, shape = _geometry(x, gw, stride)

    def call(first: int, end: int) -> Tensor:
        to = torch.empty_like(gw)
        own = (value.narrow(-4, first, end - first) for value in (x, gy))
        call_c("conv_weight", *own, to, tasks, int(not keep), _part(shape, first, end))
        return to

    gw = functools.reduce(torch.add, in_parts(call, tasks, shape.B))
    return summed(gw, len(lead), keep)


@define("conv_weight(Tensor x, Tensor gy, int size, int stride, int keep) -> Tensor", _conv_weight)
def conv_weight(x: Tensor, gy: Tensor, size: int, stride: int, keep: int) -> Tensor:
    """Return the gradient of `conv` by w [.., K, K, C, O]."""
    x, gy = x.flatten(keep, -4), gy.flatten(keep, -4)  # sums over images
    count = gy.shape[-4:-1].numel()
    if count > _LARGE:
        w = x.new_empty(gy.shape[-1], size, size, x.shape[-1]).permute(0, 3, 1, 2)

        def one(x: Tensor, gy: Tensor) -> Tensor:
            return _backward(images(gy), images(x), w, stride, False).permute(2, 3, 1, 0)

        return _each(one, x, gy) if keep else one(x, gy)
    gw = (gy.flatten(-4, -2).mT @ _columns(x, size, stride)).mT
    return gw.unflatten(-2, (size, size, -1))
