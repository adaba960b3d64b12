"""Split trees of tensors into chunks and tasks, and stack them."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metalearn.tasks.types import Loss


def split(tasks: Any, size: int) -> list[Any]:
    """Split a batch of tasks into chunks of at most `size`."""
    count = tasks.key.shape[0]
    if size >= count:
        return [tasks]
    starts = range(0, count, size)
    return [
        pytree.tree_map(lambda leaf, start=start: leaf[start : start + size], tasks)
        for start in starts
    ]


def unbind(tree: Any) -> list[Any]:
    """Split a batched tree into its T trees."""
    leaves, spec = pytree.tree_flatten(tree)
    rows = zip(*(leaf.unbind(0) for leaf in leaves), strict=True)
    return [channels_last(pytree.tree_unflatten(list(row), spec)) for row in rows]


def channels_last(tree: Any) -> Any:
    """Convert images and weights to the fastest layout for plain convolutions on CPU."""

    def convert(leaf: Tensor) -> Tensor:
        return leaf.contiguous(memory_format=torch.channels_last) if leaf.dim() == 4 else leaf

    return pytree.tree_map(convert, tree)


def stack(losses: list[Loss]) -> Loss:
    """Stack the losses of T tasks."""
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), losses[0], *losses[1:])
