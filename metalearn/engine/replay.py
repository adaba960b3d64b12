"""Trace a computation once and replay its operations, without the cost of `torch.func`."""

import operator
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from metalearn.engine import threads
from metalearn.engine.kernels import ops
from metalearn.system.errors import first_line

#: When to trace a computation: after so many seconds, and about as many calls as a trace costs.
_SECONDS, _CALLS = 2.0, 10.0

aten = torch.ops.aten
#: The same operations, called in a third of the time: small ones take little more than their call.
_BINDINGS: dict[str, Any] = {
    "view": Tensor.view,
    "expand": Tensor.expand,
    **{name: getattr(torch, name) for name in ("add", "sub", "mul", "div", "neg", "mm", "bmm")},
    **{name: getattr(torch, name) for name in ("sum", "permute", "transpose", "unsqueeze")},
}


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


class Replays:
    """Compute the chunks of a step, by a replay where that is exact.

    A chunk of a new shape is traced once it has cost some seconds. The trace is used if it gives
    the same result as the computation, bit for bit; else `report` receives the reason.

    Args:
        report: Receives a line for the user.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._seconds: dict[Any, float] = {}
        self._replays: dict[Any, Callable[..., Any]] = {}

    def __call__(
        self, function: Callable[..., Any], state: Any, chunks: list[Any], *rest: Any
    ) -> list[Any]:
        """Return `function(state, chunk, *rest)` of each chunk."""
        keys = [tuple(leaf.shape for leaf in pytree.tree_leaves(chunk)) for chunk in chunks]
        start = time.perf_counter()
        results = threads.in_order(
            lambda item: self._replays.get(item[0], function)(state, item[1], *rest),
            list(zip(keys, chunks, strict=True)),
        )
        seconds = (time.perf_counter() - start) / len(chunks)
        for key, chunk, result in zip(keys, chunks, results, strict=True):
            self._seconds[key] = self._seconds.get(key, 0.0) + seconds
            is_long = self._seconds[key] > max(_SECONDS, _CALLS * seconds)
            if is_long and key not in self._replays:
                self._replays[key] = self._traced(function, (state, chunk, *rest), result)
        return results

    def _traced(
        self, function: Callable[..., Any], args: tuple[Any, ...], expected: Any
    ) -> Callable[..., Any]:
        """Return a replay of `function`, or the function itself."""

        def exact_trace(_: int) -> Callable[..., Any]:  # in a thread, like the computation
            replay = traced(function, *args)
            pairs = zip(*map(pytree.tree_leaves, (replay(*args), expected)), strict=True)
            if not all(torch.allclose(a, b, 0, 0, equal_nan=True) for a, b in pairs):
                raise RuntimeError("the results differ")
            return replay

        try:
            return threads.in_order(exact_trace, [0])[0]
        except Exception as error:  # whatever cannot be traced is computed as before
            self._report(f"the step is not replayed from a trace: {first_line(error)}")
            return function


def traced(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """Return a function that computes `function` for arguments of the same shapes.

    Args:
        function: Pure function of trees of tensors that reads no value on the host.
        args: Trees of tensors.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # takes seconds to import

    leaves, spec = pytree.tree_flatten(args)
    specs: list[Any] = []

    def flat(*leaves: Any) -> list[Tensor]:
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
    """Remove identities and repeated operations; call what remains directly.

    The results stay the same, bit for bit.
    """
    seen: dict[Any, Any] = {}
    node: Any
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
        if node.op == "call_function" and node.target is not operator.getitem:
            namespace, _, name = node.target._schema.name.partition("::")
            if namespace == "metalearn":
                node.target = ops.ON_CPU[name]
            elif name in _BINDINGS:
                node.target = _BINDINGS[name]


def _merge(node: Any) -> None:
    """Merge two permutations, and a negation with a product with a number."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return
    if node.target is first.target is aten.permute.default:
        inner: Any = first.args[1]
        node.args = (first.args[0], [inner[axis] for axis in node.args[1]])
    elif (
        node.target is aten.mul.Tensor
        and first.target is aten.neg.default
        and isinstance(node.args[1], float)
    ):
        node.args = (first.args[0], -node.args[1])


def _is_identity(node: Any) -> bool:
    """Return True if a node returns its first argument."""
    if node.target is aten.permute.default:
        return list(node.args[1]) == sorted(node.args[1])
    if node.target in (aten.view.default, aten.expand.default):
        return node.meta["val"].shape == node.args[0].meta["val"].shape
    return node.target in (
        aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default
    )  # fmt: skip
