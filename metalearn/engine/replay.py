"""Trace a computation once and replay its operations, without the cost of `torch.func`."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from metalearn.engine.kernels import ops

aten = torch.ops.aten


class FastSums(TorchDispatchMode):
    """Sum gradients of weights over tasks in their memory layout.

    torch allocates the result of a sum row by row; if the weights have another layout
    (`kernels.weight_layout`), summing takes ten times as long as it has to.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.sum.dim_IntList and not kwargs:
            x, axes = args[:2]
            order = sorted(range(1, x.dim()), key=x.stride, reverse=True)
            if list(axes) == [0] and args[2:] == (True,) and order != list(range(1, x.dim())):
                back = [0, *(1 + order.index(axis) for axis in range(1, x.dim()))]
                return x.permute(0, *order).sum(0, keepdim=True).permute(back)
        return func(*args, **(kwargs or {}))


def traced(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """Return a function that computes `function` for arguments of the same shapes.

    Args:
        function: Pure function of trees of tensors that reads no value on the host.
        args: Trees of tensors.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # takes seconds to import

    leaves, spec = pytree.tree_flatten(args)
    specs: list[Any] = []

    def flat(*leaves: Tensor) -> list[Tensor]:
        result = function(*pytree.tree_unflatten(list(leaves), spec))
        outputs, out_spec = pytree.tree_flatten(result)
        specs.append(out_spec)
        return outputs

    module = make_fx(flat)(*leaves)
    _simplify(module.graph)
    module.recompile()

    def replay(*args: Any) -> Any:
        with torch.no_grad():
            return pytree.tree_unflatten(module(*pytree.tree_leaves(args)), specs[0])

    return replay


def _simplify(graph: fx.Graph) -> None:
    """Remove identities and repeated operations; call own operators without the dispatcher.

    The results stay the same, bit for bit.
    """
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.squeeze_.dims:  # changes no value
            node.target = aten.squeeze.dims
        if node.target is not operator.getitem and node.target._schema.is_mutable:
            break  # then equal operations may have different results
        _merge(node)
        key = (node.target, str(node.args), str(node.kwargs))
        same = node.args[0] if _is_identity(node) else seen.setdefault(key, node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if getattr(node.target, "namespace", "") == "metalearn":
            node.target = ops.ON_CPU[node.target._schema.name.partition("::")[2]]


def _merge(node: fx.Node) -> None:
    """Merge two permutations, and a negation with a product with a number."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return
    if node.target is first.target is aten.permute.default:
        inner, outer = (one.args[1] for one in (first, node))
        node.args = (first.args[0], [inner[axis] for axis in outer])
    elif node.target is aten.mul.Tensor and first.target is aten.neg.default:
        if isinstance(node.args[1], float):
            node.args = (first.args[0], -node.args[1])


def _is_identity(node: fx.Node) -> bool:
    """Return True if a node returns its first argument."""
    if node.target is aten.permute.default:
        return list(node.args[1]) == sorted(node.args[1])
    if node.target in (aten.view.default, aten.expand.default):
        return node.meta["val"].shape == node.args[0].meta["val"].shape
    return node.target in (
        aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default
    )  # fmt: skip
