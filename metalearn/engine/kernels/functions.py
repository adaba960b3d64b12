"""Derivatives and batching of the operators in `ops` and `convolutions`."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from metalearn.engine.kernels import convolutions, ops


class Function(torch.autograd.Function):
    """An operator with a rule for `vmap`: another leading axis.

    Attributes:
        ranks: Number of axes of each tensor argument without leading ones; None for others.
        shared: Positions of the weights, which may have no leading axes.
        has_keep: True if the last argument is `keep`.
        outputs: Number of outputs.
    """

    operator: ClassVar[Any]
    ranks: ClassVar[tuple[int | None, ...]]
    shared: ClassVar[tuple[int, ...]] = ()
    has_keep: ClassVar[bool] = False
    outputs: ClassVar[int] = 1

    @classmethod
    def forward(cls, *args: Any) -> Any:
        """Compute the operator."""
        return cls.operator(*args)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        """Compute the operator with one more leading axis."""
        lead = max(
            arg.dim() - rank - (axis is not None)
            for arg, rank, axis in zip(args, cls.ranks, in_dims, strict=True)
            if isinstance(arg, Tensor) and rank is not None
        )
        batched = list(args)
        for index, (arg, rank, axis) in enumerate(zip(args, cls.ranks, in_dims, strict=True)):
            if not isinstance(arg, Tensor) or rank is None:
                continue
            own = arg.dim() - rank - (axis is not None)
            if axis is None and own == 0 and index in cls.shared:
                continue
            moved = arg.unsqueeze(0) if axis is None else arg.movedim(axis, 0)
            moved = moved.reshape(moved.shape[0], *(1,) * (lead - own), *moved.shape[1:])
            sizes = next(
                other.movedim(where, 0).shape[1 : lead + 1] if where is not None
                else other.shape[:lead]
                for other, r, where in zip(args, cls.ranks, in_dims, strict=True)
                if isinstance(other, Tensor) and r is not None
                and other.dim() - r - (where is not None) == lead
            )  # fmt: skip
            batched[index] = moved.expand(info.batch_size, *sizes, *moved.shape[lead + 1 :])
        if cls.has_keep:
            batched[-1] += 1
        return cls.apply(*batched), 0 if cls.outputs == 1 else (0,) * cls.outputs


def lead_axes(value: Tensor, rank: int) -> int:
    """Return the number of leading axes of a tensor that has `rank` others."""
    return value.dim() - rank


class _Conv(Function):
    """`convolutions.conv`, whose gradients are the other two operators of its set."""

    operator, ranks, shared = convolutions.conv, (4, 4, None), (1,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.stride = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        gx = gw = None
        if ctx.needs_input_grad[0]:
            gx = _ConvInput.apply(gy, w, *x.shape[-3:-1], ctx.stride)
        if ctx.needs_input_grad[1]:
            gw = _ConvWeight.apply(x, gy, w.shape[-4], ctx.stride, lead_axes(w, 4))
        return gx, gw, None


class _ConvInput(Function):
    """`convolutions.conv_input`, linear in both arguments."""

    operator, ranks, shared = convolutions.conv_input, (4, 4, None, None, None), (1,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        gy, w, _, _, ctx.stride = inputs
        ctx.save_for_backward(gy, w)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Any, ...]:
        gy, w = ctx.saved_tensors
        dgy = dw = None
        if ctx.needs_input_grad[0]:
            dgy = _Conv.apply(u, w, ctx.stride)
        if ctx.needs_input_grad[1]:
            dw = _ConvWeight.apply(u, gy, w.shape[-4], ctx.stride, lead_axes(w, 4))
        return dgy, dw, None, None, None


class _ConvWeight(Function):
    """`convolutions.conv_weight`, linear in both arguments."""

    operator, ranks, has_keep = convolutions.conv_weight, (4, 4, None, None, None), True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, gy, _, ctx.stride, _ = inputs
        ctx.save_for_backward(x, gy)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Any, ...]:
        x, gy = ctx.saved_tensors
        u = _spread(u, 4, x)
        dx = dgy = None
        if ctx.needs_input_grad[0]:
            dx = _ConvInput.apply(gy, u, *x.shape[-3:-1], ctx.stride)
        if ctx.needs_input_grad[1]:
            dgy = _Conv.apply(x, u, ctx.stride)
        return dx, dgy, None, None, None


def _spread(u: Tensor, rank: int, x: Tensor) -> Tensor:
    """Expand a cotangent that keeps some leading axes of x, but not all, to all of them."""
    lead, kept = x.dim() - (4 if rank != 2 else 2), u.dim() - rank
    if kept in (0, lead):
        return u
    u = u.reshape(*u.shape[:kept], *(1,) * (lead - kept), *u.shape[kept:])
    return u.expand(*x.shape[:lead], *u.shape[lead:])


class _Norm(Function):
    """`ops.norm`; also gradients by xh and r, which second derivatives need."""

    operator, ranks, shared, outputs = ops.norm, (4, 1, 1, None, None), (1, 2), 3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, g, b, _, ctx.slope = inputs
        ctx.save_for_backward(g, b, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, ga: Any, gxh: Any, gr: Any) -> tuple[Any, ...]:
        g, b, a, xh, r = ctx.saved_tensors
        ga = torch.zeros_like(a) if ga is None else ga
        keep = max(lead_axes(g, 1), lead_axes(b, 1))
        gy, gg, gb = _NormVjp.apply(ga, gxh, gr, g, a, xh, r, ctx.slope, keep)
        return gy, sum_of_shared(gg, g), sum_of_shared(gb, b), None, None


def sum_of_shared(gradient: Tensor, like: Tensor) -> Tensor:
    """Sum the gradient of weights over the tasks that share them."""
    return gradient.sum_to_size(like.shape) if gradient.dim() > like.dim() else gradient


class _NormVjp(Function):
    """`ops.norm_vjp`, differentiable where gradients by xh and r are zero."""

    operator, ranks = ops.norm_vjp, (4, 4, 1, 1, 4, 4, 1, None, None)
    shared, has_keep, outputs = (3,), True, 3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ga, gxh, gr, g, a, xh, r, ctx.slope, _ = inputs
        ctx.is_second = gxh is not None or gr is not None
        ctx.save_for_backward(ga, g, a, xh, r)

    @staticmethod
    def backward(ctx: Any, u: Tensor, ug: Tensor, ub: Tensor) -> tuple[Any, ...]:
        if ctx.is_second:
            raise NotImplementedError(_NO_THIRD)
        ga, g, a, xh, r = ctx.saved_tensors
        ug, ub = (_spread(value, 1, u) for value in (ug, ub))
        dga, dxh, dr, dg = _NormSecond.apply(u, ug, ub, ga, g, a, xh, r, ctx.slope, lead_axes(g, 1))
        return dga, None, None, dg, None, dxh, dr, None, None


_NO_THIRD = (
    "third derivatives of a normalisation are not implemented for engine.convolution=direct; "
    "use engine.convolution=plain"
)


class Last(Function):
    """An operator without a derivative; `refusal` says which one is missing."""

    refusal: ClassVar[str]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep nothing."""

    @classmethod
    def backward(cls, ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        """Raise NotImplementedError: there is no derivative."""
        raise NotImplementedError(cls.refusal)


class _NormSecond(Last):
    """`ops.norm_second`, which has no derivative."""

    operator, ranks = ops.norm_second, (4, 1, 1, 4, 1, 4, 4, 1, None, None)
    shared, has_keep, outputs = (1, 2, 4), True, 4

    refusal = _NO_THIRD


class _Affine(Function):
    """`ops.affine`."""

    operator, ranks, shared = ops.affine, (2, 2, 2, None), (1,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, w, by, ctx.slope = inputs
        ctx.save_for_backward(x, w, output if by is None else by)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
        x, w, by = ctx.saved_tensors
        gx = gw = None
        if ctx.needs_input_grad[0]:
            gx = torch.where(by <= 0, gy * ctx.slope, gy) @ w.mT
        if ctx.needs_input_grad[1]:
            gw = _AffineWeight.apply(x, gy, by, ctx.slope, lead_axes(w, 2))
        return gx, gw, None, None


class _AffineWeight(Function):
    """`ops.affine_weight`, linear in g."""

    operator, ranks, has_keep = ops.affine_weight, (2, 2, 2, None, None), True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, g, y, ctx.slope, _ = inputs
        ctx.save_for_backward(x, g, y)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Any, ...]:
        x, g, y = ctx.saved_tensors
        u = _spread(u, 2, x)
        dx = dg = None
        if ctx.needs_input_grad[0]:
            dx = torch.where(y <= 0, g * ctx.slope, g) @ u.mT
        if ctx.needs_input_grad[1]:
            dg = _Affine.apply(x, u, y, ctx.slope)
        return dx, dg, None, None, None


class _Patches(Function):
    """`convolutions.patches`."""

    operator, ranks = convolutions.patches, (4, None, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, ctx.size, ctx.stride = inputs
        ctx.shape = x.shape[-4:]

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
        # Patches are a convolution with one filter for each of their elements.
        batch, height, width, _ = ctx.shape
        outputs = (-(-extent // ctx.stride) for extent in (height, width))
        gy = gy[..., :-1].unflatten(-2, (batch, *outputs))
        one = torch.eye(gy.shape[-1], dtype=gy.dtype, device=gy.device)
        one = one.unflatten(0, (ctx.size, ctx.size, -1))
        return _ConvInput.apply(gy, one, height, width, ctx.stride), None, None


class _Moments(Function):
    """`ops.moments`."""

    operator, ranks, outputs = ops.moments, (2,), 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx: Any, gm: Tensor, gc: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        centred = x.double() - mean.unsqueeze(-2)
        return ((gm.unsqueeze(-2) + centred @ (gc + gc.mT)) / x.shape[-2]).to(x.dtype)


#: The operators of the same names, differentiable and batched by `vmap`.
conv, norm, affine, patches, moments = (
    function.apply for function in (_Conv, _Norm, _Affine, _Patches, _Moments)
)
