"""What methods with an inner loop share: steps whose intermediate values are computed again instead of kept."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class _Again(torch.autograd.Function):
    """A function whose backward pass computes it once more; keeps its inputs alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], *leaves: Tensor) -> tuple[Tensor, ...]:
        return function(*leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function = inputs[0]
        device = inputs[1].device.type
        # As it was computed, so it is computed again.
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        leaves = ctx.saved_tensors
        places = [place for place, leaf in enumerate(leaves) if leaf.is_floating_point()]

        def of_floats(*floats: Tensor) -> tuple[Tensor, ...]:
            values = list(leaves)
            for place, value in zip(places, floats, strict=True):
                values[place] = value
            return ctx.function(*values)

        with torch.autocast(*ctx.autocast):
            pull = torch.func.vjp(of_floats, *(leaves[place] for place in places))[1]
        found: list[Tensor | None] = [None] * len(leaves)
        for place, gradient in zip(places, pull(cotangents), strict=True):
            found[place] = gradient
        return (None, *found)


def rematerialised(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same pure function of trees of tensors, differentiable once more, that keeps nothing but its arguments.

    A chain of K such steps needs memory for K arguments and one step's intermediate values, and one more evaluation of
    each (Griewank and Walther 2000, "Revolve", with every step a checkpoint). Works under `vmap`; everything tensors
    come from must be an argument.
    """

    def wrapped(*trees: Any) -> Any:
        leaves, spec = pytree.tree_flatten(trees)
        out: list[Any] = []

        def flat(*values: Tensor) -> tuple[Tensor, ...]:
            found, shape = pytree.tree_flatten(function(*pytree.tree_unflatten(list(values), spec)))
            out.append(shape)
            return tuple(found)

        found = _Again.apply(flat, *leaves)
        return pytree.tree_unflatten(list(found), out[0])

    return wrapped
