"""Trace a computation once and replay its operations, without the cost of `torch.func`."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from metalearn.engine.kernels import ops

#: Operations that return their argument.
_IDENTITIES = (
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.lift_fresh_copy.default,
)


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
    """Remove identities and repeated operations; call own operators without the dispatcher."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        if getattr(node.target, "namespace", "") == "metalearn":
            node.target = ops.ON_CPU[node.target._schema.name.partition("::")[2]]
        elif node.target is torch.ops.aten.squeeze_.dims:
            node.target = torch.ops.aten.squeeze.dims
        elif node.target is not operator.getitem and node.target._schema.is_mutable:
            return  # then equal operations may have different results
        key = (node.target, str(node.args), str(node.kwargs))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node
    graph.eliminate_dead_code()
