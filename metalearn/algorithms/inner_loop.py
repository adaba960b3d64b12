"""Rematerialisation of inner steps: recompute intermediate values instead of storing them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class _Recompute(torch.autograd.Function):
    """Store only the inputs of a function and call it again in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], *leaves: Tensor) -> tuple[Tensor, ...]:
        return function(*leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function = inputs[0]
        device = inputs[1].device.type
        # The second evaluation must use the same autocast settings.
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        leaves = ctx.saved_tensors
        indices = [index for index, leaf in enumerate(leaves) if leaf.is_floating_point()]

        def of_floats(*floats: Tensor) -> tuple[Tensor, ...]:
            values = list(leaves)
            for index, value in zip(indices, floats, strict=True):
                values[index] = value
            return ctx.function(*values)

        with torch.autocast(*ctx.autocast):
            pullback = torch.func.vjp(of_floats, *(leaves[index] for index in indices))[1]
        gradients: list[Tensor | None] = [None] * len(leaves)
        for index, gradient in zip(indices, pullback(cotangents), strict=True):
            gradients[index] = gradient
        return (None, *gradients)


def rematerialised(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same function, but store only its arguments for the backward pass.

    A chain of K such steps stores K arguments and the intermediate values of one step, and
    evaluates each step once more (Griewank and Walther 2000, "Revolve", with every step a
    checkpoint). The result works under `vmap` and is differentiable once more. The function is
    pure, of trees; every tensor that it uses must be an argument.
    """

    def wrapped(*trees: Any) -> Any:
        leaves, spec = pytree.tree_flatten(trees)
        out: list[Any] = []

        def flat(*values: Tensor) -> tuple[Tensor, ...]:
            results, out_spec = pytree.tree_flatten(
                function(*pytree.tree_unflatten(list(values), spec))
            )
            out.append(out_spec)
            return tuple(results)

        results = _Recompute.apply(flat, *leaves)
        return pytree.tree_unflatten(list(results), out[0])

    return wrapped
