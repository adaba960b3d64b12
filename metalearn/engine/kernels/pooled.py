"""Derivatives and batching of the operators in `pooling`."""

from typing import Any

from torch import Tensor

from metalearn.engine.kernels import pooling
from metalearn.engine.kernels.functions import Function, Last, lead_axes, sum_of_shared
from metalearn.engine.kernels.ops import masked

_NO_SECOND = (
    "second derivatives of blocks with pooling are not implemented for engine.convolution=direct; "
    "declare `takes_gradients` in the method, or use engine.convolution=plain"
)


class _NormPool(Function):
    """`pooling.norm_pool`, which has first derivatives only."""

    operator, ranks, shared, outputs = pooling.norm_pool, (4, 1, 1, None, None), (1, 2), 5

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        y, g, b, ctx.eps, ctx.slope = inputs
        ctx.save_for_backward(y, g, b, *output)
        ctx.mark_non_differentiable(*output[1:3])

    @staticmethod
    def backward(ctx: Any, ga: Tensor, _p: Any, _index: Any, gm: Tensor, gv: Tensor) -> Any:
        y, g, b, *output = ctx.saved_tensors
        keep = max(lead_axes(g, 1), lead_axes(b, 1))
        gy, gg, gb = _NormPoolVjp.apply(ga, gm, gv, g, y, *output, ctx.eps, ctx.slope, keep)
        return gy, sum_of_shared(gg, g), sum_of_shared(gb, b), None, None


class _NormPoolVjp(Last):
    """`pooling.norm_pool_vjp`, which has no derivative."""

    operator, shared, has_keep, outputs = pooling.norm_pool_vjp, (3,), True, 3
    ranks = (4, 1, 1, 1, 4, 4, 4, 4, 1, 1, None, None, None)

    refusal = _NO_SECOND


class _AffinePool(Function):
    """`pooling.affine_pool`, which has first derivatives only."""

    operator, ranks = pooling.affine_pool, (2, 2, None, None, None)
    shared, outputs = (1,), 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, w, *ctx.settings = inputs
        ctx.save_for_backward(x, w, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor, _index: Any) -> tuple[Any, ...]:
        x, w, a, index = ctx.saved_tensors
        height, width, slope = ctx.settings
        gx = gw = None
        if ctx.needs_input_grad[0]:
            dense = pooling.unpooled(masked(g, a, slope), index, height, width)
            gx = dense.flatten(-4, -2) @ w.mT
        if ctx.needs_input_grad[1]:
            gw = _AffinePoolWeight.apply(x, g, a, index, height, width, slope, lead_axes(w, 2))
        return gx, gw, None, None, None


class _AffinePoolWeight(Last):
    """`pooling.affine_pool_weight`, which has no derivative."""

    operator, has_keep = pooling.affine_pool_weight, True
    ranks = (2, 4, 4, 4, None, None, None, None)

    refusal = _NO_SECOND


#: The operators of the same names in `pooling`, differentiable and batched by `vmap`.
norm_pool, affine_pool = (function.apply for function in (_NormPool, _AffinePool))
