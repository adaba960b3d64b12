"""Layers of T tasks as operators of `torch.library`, on channels-last tensors.

Two sets of operators are closed under differentiation, so that reverse mode over reverse mode needs
no other: convolution with its two gradients, and normalisation with activation, its vector-Jacobian
product and the derivative of that. `affine` is the first block, a product with constant patches.

Every operator has a torch implementation, for any device and dtype, and one in C (`build`) for
float32 on a CPU. Every tensor may have leading axes L (tasks). Weights that all tasks share have
none. `keep` is the number of leading axes that a gradient of weights keeps; it is summed over the
others.

Legend of shapes: B images, H x W pixels, C channels in, O out, K size of filters, M = B H W.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.engine import process, threads
from metalearn.engine.kernels import build

_LIBRARY = torch.library.Library("metalearn", "DEF")
#: The function behind each operator on a CPU, which a replay calls without the dispatcher.
ON_CPU: dict[str, Callable[..., Any]] = {}
#: Pixels of outputs with the same weights, from which a plain convolution is faster than a product.
_LARGE = 200


def define(schema: str, in_c: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Define an operator by its torch implementation; `in_c` is for float32 on a CPU."""
    name = schema.partition("(")[0]

    def defined(in_torch: Callable[..., Any]) -> Any:
        def on_cpu(*args: Any) -> Any:
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            is_float = all(one.dtype in (torch.float32, torch.uint8) for one in tensors)
            function = in_c if is_float and build.library() is not None else in_torch
            if not torch.autograd._profiler_enabled():
                return function(*args)
            with torch.profiler.record_function(f"metalearn::{name}"):
                return function(*args)

        _LIBRARY.define(schema)
        _LIBRARY.impl(name, in_torch, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, on_cpu, "CPU")
        ON_CPU[name] = on_cpu
        return getattr(torch.ops.metalearn, name).default

    return defined


def call_c(name: str, *args: Any) -> None:
    """Call a C function; tensors become addresses."""
    if getattr(build.library(), name)(
        *(arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args)
    ):
        raise MemoryError(f"metalearn::{name}: out of memory")


def in_parts(call: Callable[[int, int], Any], tasks: int, count: int, least: int = 1) -> list[Any]:
    """Return `call(first, end)` of each part of `count` images or channels.

    Parts have a multiple of `least`. Several tasks are one part. A single task has a part for each
    core of the machine, computed by
    the threads of torch; so the results do not depend on the number of these threads.
    """
    parts = process.ALL_THREADS if tasks == 1 else 1
    size = max(1, -(-count // (parts * least))) * least
    return threads.in_order(
        lambda first: call(first, min(first + size, count)), range(0, count, size)
    )


def summed(gradient: Tensor, lead: int, keep: int) -> Tensor:
    """Sum a gradient with `lead` leading axes over all but the first `keep` of them."""
    return gradient.sum(tuple(range(keep, lead))) if keep < lead else gradient


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


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    *lead, count, size = x.shape
    mean = x.new_empty(*lead, size, dtype=torch.float64)
    covariance = x.new_empty(*lead, size, size, dtype=torch.float64)
    call_c("moments", x, mean, covariance, x.shape[:-2].numel(), count, size)
    return mean, covariance


@define("moments(Tensor x) -> (Tensor, Tensor)", _moments)
def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean [.., K] and covariance [.., K, K] of the rows of x [.., M, K], in float64."""
    exact = x.double()
    mean = exact.mean(-2)
    centred = exact - mean.unsqueeze(-2)
    return mean, centred.mT @ centred / x.shape[-2]


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
        if w.dim() > 4:
            return _each(lambda x, w: conv(x, w, stride), x, w)
        y = F.conv2d(images(x), _filters(w), None, stride, size // 2).permute(0, 2, 3, 1)
        return y.contiguous().unflatten(0, x.shape[:-3])
    y = _columns(x, size, stride) @ w.flatten(-4, -2)
    return y.unflatten(-2, (x.shape[-4], height, width))


def _sharing(x: Tensor, w: Tensor) -> int:
    """Return the number of images x that share the weights w."""
    return x.shape[:-3].numel() if w.dim() == 4 else x.shape[-4]


def images(x: Tensor) -> Tensor:
    """Return maps [.., H, W, C] as [B, C, H, W]."""
    return x.flatten(0, -4).permute(0, 3, 1, 2)


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
        result = own.new_empty(lead.numel(), *own.shape) if result is None else result
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
        if w.dim() > 4:
            return _each(lambda gy, w: conv_input(gy, w, height, width, stride), gy, w)
        x = images(gy.new_empty(*gy.shape[:-3], height, width, w.shape[-2]))
        gx = _backward(images(gy), x, _filters(w), stride, True).permute(0, 2, 3, 1)
        return gx.contiguous().unflatten(0, gy.shape[:-3])
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
    if keep and count > _LARGE:
        return _each(lambda x, gy: conv_weight(x, gy, size, stride, 0), x, gy)
    if count > 4 * _LARGE:
        w = _filters(x.new_empty(size, size, x.shape[-1], gy.shape[-1]))
        gw = _backward(images(gy), images(x), w, stride, False)
        return gw.permute(2, 3, 1, 0).contiguous()
    gw = _columns(x, size, stride).mT @ gy.flatten(-4, -2)
    return gw.unflatten(-2, (size, size, -1))


def masked(g: Tensor, a: Tensor, slope: float) -> Tensor:
    """Multiply g by the derivative of the activation whose output is a."""
    if slope == 0:
        return torch.ops.aten.threshold_backward(g, a, 0)  # NaN passes
    return g if slope == 1 else torch.where(a <= 0, g * slope, g)


def activate(z: Tensor, slope: float) -> Tensor:
    """Apply the activation in place."""
    return z.relu_() if slope == 0 else F.leaky_relu_(z, slope)


def expanded(g: Tensor, like: Tensor) -> Tensor:
    """Return per-channel values [C] or [.., C] as [.., 1, 1, 1, C] beside `like`."""
    return g[..., None, None, None, :] if g.dim() > 1 or like.dim() == 4 else g


PIXELS = (-4, -3, -2)


def _sizes(y: Tensor, g: Tensor) -> tuple[int, int, int, int]:
    """Return T, M, C, and whether tasks share the weights g."""
    return y.shape[:-4].numel(), y.shape[-4:-1].numel(), y.shape[-1], int(g.dim() == 1)


def _norm(
    y: Tensor, g: Tensor, b: Tensor, eps: float, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    if g.dim() != b.dim():
        g, b = (value.expand(*y.shape[:-4], y.shape[-1]) for value in (g, b))
    y, g, b = y.contiguous(), g.contiguous(), b.contiguous()
    a, xh = torch.empty_like(y), torch.empty_like(y)
    r = y.new_empty(*y.shape[:-4], y.shape[-1])
    call_c("norm", y, g, b, a, xh, r, *_sizes(y, g), eps, slope)
    return a, xh, r


@define(
    "norm(Tensor y, Tensor g, Tensor b, float eps, float slope) -> (Tensor, Tensor, Tensor)", _norm
)
def norm(
    y: Tensor, g: Tensor, b: Tensor, eps: float, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise y [.., B, H, W, C] by its statistics, then apply scale, shift and activation.

    Returns:
        a = act(xh g + b), where act(z) = z if z > 0 else slope z; xh = (y - mean) r [like y];
        r = 1 / sqrt(var + eps) [.., C].
    """
    xh = y - y.mean(PIXELS, keepdim=True)
    a = xh * xh
    r = torch.rsqrt(a.mean(PIXELS, keepdim=True) + eps)
    xh.mul_(r)
    torch.addcmul(expanded(b, y), xh, expanded(g, y), out=a)
    return activate(a, slope), xh, r[..., 0, 0, 0, :].contiguous()


def _norm_vjp(
    ga: Tensor, gxh: Tensor | None, gr: Tensor | None, g: Tensor, a: Tensor, xh: Tensor, r: Tensor,
    slope: float, keep: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    ga, g, a, xh, r = (value.contiguous() for value in (ga, g, a, xh, r))
    if gxh is not None or gr is not None:
        gxh = torch.zeros_like(xh) if gxh is None else gxh.contiguous()
        gr = torch.zeros_like(r) if gr is None else gr.contiguous()
    gy, gg, gb = torch.empty_like(xh), torch.empty_like(r), torch.empty_like(r)
    call_c("norm_vjp", ga, gxh, gr, g, a, xh, r, gy, gg, gb, *_sizes(xh, g), slope)
    lead = r.dim() - 1
    return gy, summed(gg, lead, keep), summed(gb, lead, keep)


@define(
    "norm_vjp(Tensor ga, Tensor? gxh, Tensor? gr, Tensor g, Tensor a, Tensor xh, Tensor r, "
    "float slope, int keep) -> (Tensor, Tensor, Tensor)",
    _norm_vjp,
)
def norm_vjp(
    ga: Tensor, gxh: Tensor | None, gr: Tensor | None, g: Tensor, a: Tensor, xh: Tensor, r: Tensor,
    slope: float, keep: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of `norm` by y, g and b, given those by a, xh and r (None for zero)."""
    m, lead = masked(ga, a, slope), r.dim() - 1
    product = m * xh
    gb, gg, count = m.sum(PIXELS), product.sum(PIXELS), xh.shape[-4:-1].numel()
    rate, along, centre = g * r, gg * g, gb * g
    if gxh is not None:
        m = torch.addcmul(gxh, m, expanded(g, xh))
        torch.mul(m, xh, out=product)
        rate, along, centre = r, product.sum(PIXELS), m.sum(PIXELS)
    if gr is not None:
        along = along + r * gr
    centre, along = (expanded(one * r / -count, xh) for one in (centre, along))
    gy = torch.addcmul(centre, xh, along, out=product).addcmul_(m, expanded(rate, xh))
    return gy, summed(gg, lead, keep), summed(gb, lead, keep)


def _norm_second(
    u: Tensor, ug: Tensor, ub: Tensor, ga: Tensor, g: Tensor, a: Tensor, xh: Tensor, r: Tensor,
    slope: float, keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    u, ga, g, a, xh, r = (value.contiguous() for value in (u, ga, g, a, xh, r))
    ug, ub = ug.expand_as(r).contiguous(), ub.expand_as(r).contiguous()
    da, dxh, dr, dg = (torch.empty_like(value) for value in (xh, xh, r, r))
    call_c("norm_second", u, ug, ub, ga, g, a, xh, r, da, dxh, dr, dg, *_sizes(xh, g), slope)
    return da, dxh, dr, summed(dg, r.dim() - 1, keep)


@define(
    "norm_second(Tensor u, Tensor ug, Tensor ub, Tensor ga, Tensor g, Tensor a, Tensor xh, "
    "Tensor r, float slope, int keep) -> (Tensor, Tensor, Tensor, Tensor)",
    _norm_second,
)
def norm_second(
    u: Tensor, ug: Tensor, ub: Tensor, ga: Tensor, g: Tensor, a: Tensor, xh: Tensor, r: Tensor,
    slope: float, keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of `norm_vjp` by ga, xh, r and g, for gxh = gr = 0.

    u, ug and ub are the gradients by its outputs gy, gg and gb; the other arguments are its own.
    """
    m, count = masked(ga, a, slope), xh.shape[-4:-1].numel()
    product = m * xh
    p, q = m.sum(PIXELS), product.sum(PIXELS)
    sum_u, along_u = u.sum(PIXELS), torch.mul(u, xh, out=product).sum(PIXELS)
    ds = torch.mul(u, m, out=product).sum(PIXELS) - (sum_u * p + along_u * q) / count
    s = g * r
    shift, along = ub - s * sum_u / count, expanded(ug - s * along_u / count, xh)
    gn = torch.addcmul(expanded(shift, xh), u, expanded(s, xh), out=product).addcmul_(xh, along)
    dxh = (m * along).addcmul_(u, expanded(s * q / -count, xh))
    return masked(gn, a, slope), dxh, g * ds, summed(r * ds, r.dim() - 1, keep)


def _affine(x: Tensor, w: Tensor, by: Tensor | None, slope: float) -> Tensor:
    x, w = x.contiguous(), w.contiguous()
    by = None if by is None else by.contiguous()
    y = x.new_empty(*x.shape[:-1], w.shape[-1])
    call_c("affine", x, w, by, y, x.shape[:-2].numel(), *x.shape[-2:], w.shape[-1],
          int(w.dim() == 2), slope)  # fmt: skip
    return y


@define("affine(Tensor x, Tensor w, Tensor? by, float slope) -> Tensor", _affine)
def affine(x: Tensor, w: Tensor, by: Tensor | None, slope: float) -> Tensor:
    """Return x [.., M, K] @ w [.., K, O], then the activation, or its derivative where `by` is."""
    y = x @ w
    return activate(y, slope) if by is None else masked(y, by, slope)


def _affine_weight(x: Tensor, g: Tensor, y: Tensor, slope: float, keep: int) -> Tensor:
    x, g, y = x.contiguous(), g.contiguous(), y.contiguous()
    lead = x.shape[:-2] if keep else ()
    gw = x.new_empty(*lead, x.shape[-1], g.shape[-1])
    call_c("affine_weight", x, g, y, gw, x.shape[:-2].numel(), *x.shape[-2:], g.shape[-1],
          int(not keep), slope)  # fmt: skip
    return summed(gw, len(lead), keep)


@define("affine_weight(Tensor x, Tensor g, Tensor y, float slope, int keep) -> Tensor",
           _affine_weight)  # fmt: skip
def affine_weight(x: Tensor, g: Tensor, y: Tensor, slope: float, keep: int) -> Tensor:
    """Return the gradient of `affine` by w [.., K, O]; y: the output, or `by`."""
    return summed(x.mT @ masked(g, y, slope), x.dim() - 2, keep)
