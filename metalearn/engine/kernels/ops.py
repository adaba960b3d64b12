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
    core of the machine, computed by the threads of torch; so the results do not depend on the
    number of these threads.
    """
    parts = process.ALL_THREADS if tasks == 1 else 1
    size = max(1, -(-count // (parts * least))) * least
    return threads.in_order(
        lambda first: call(first, min(first + size, count)), range(0, count, size)
    )


def summed(gradient: Tensor, lead: int, keep: int) -> Tensor:
    """Sum a gradient with `lead` leading axes over all but the first `keep` of them."""
    return gradient.sum(tuple(range(keep, lead))) if keep < lead else gradient


def images(x: Tensor) -> Tensor:
    """Return maps [.., H, W, C] as [B, C, H, W]."""
    return x.flatten(0, -4).permute(0, 3, 1, 2)


def masked(g: Tensor, a: Tensor, slope: float, out: Tensor | None = None) -> Tensor:
    """Multiply g by the derivative of the activation whose output is a; `out` may be used."""
    if slope == 0:  # NaN passes
        where = {} if out is None else {"grad_input": out}
        return torch.ops.aten.threshold_backward(g, a, 0, **where)
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
    return activate(y, slope) if by is None else masked(y, by, slope, out=y)


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
    lead = x.shape[:-2]
    rows = (one.reshape(-1, *one.shape[-2:]) for one in (x, g, y))
    # Task by task, so that the masked gradients stay in the caches.
    gw = torch.stack([x.mT @ masked(g, y, slope) for x, g, y in zip(*rows, strict=True)])
    return summed(gw.reshape(*lead, *gw.shape[1:]), len(lead), keep)


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
