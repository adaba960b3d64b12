"""Trace a computation once and replay its operations, without the cost of `torch.func`."""

import operator
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from metalearn.engine import threads
from metalearn.engine.kernels import ops
from metalearn.system.errors import first_line

#: When to trace a computation: after so many seconds, and about as many calls as a trace costs.
_SECONDS, _CALLS = 0.3, 3.0

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
    """Compute the chunks of a step or of a test, by a replay where that is exact.

    Once chunks of a shape have cost some seconds, one is traced while it is computed. The trace is
    used if it gives the same result for another chunk as the computation, bit for bit; else
    `report` receives the reason.

    Args:
        report: Receives a line for the user.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._seconds: dict[Any, tuple[float, float]] = {}  # of all chunks of a shape, of the last
        self._traced: dict[Any, Any] = {}  # not yet checked: a replay, or why there is none
        self._replays: dict[Any, Callable[..., Any]] = {}

    def __call__(
        self,
        function: Callable[..., Any],
        state: Any,
        chunks: list[Any],
        *rest: Any,
        compute: Callable[..., list[Any]] = threads.in_order,
    ) -> list[Any]:
        """Return `function(state, chunk, *rest)` of each chunk, with the threads of `compute`."""
        keys = [tuple(leaf.shape for leaf in pytree.tree_leaves(chunk)) for chunk in chunks]
        first = {key: keys.index(key) for key in keys if self._is_due(key)}

        def computed(index: int) -> Any:
            key, args = keys[index], (state, chunks[index], *rest)
            if first.get(key) == index:
                try:
                    result, self._traced[key] = recorded(function, *args)
                except Exception as error:  # whatever cannot be traced is computed as before
                    self._traced[key] = error
                else:
                    return result
            return self._replays.get(key, function)(*args)

        start = time.perf_counter()
        results = compute(computed, range(len(chunks)))
        seconds = (time.perf_counter() - start) / len(chunks)
        for key in keys:
            self._seconds[key] = (self._seconds.get(key, (0.0, 0.0))[0] + seconds, seconds)
        last = {key: index for index, key in enumerate(keys)}
        for key, index in last.items():
            if key in self._traced and index != first.get(key):  # not the traced chunk itself
                replay, args = self._traced.pop(key), (state, chunks[index], *rest)
                checked = self._checked(replay, args, results[index], compute)
                self._replays[key] = checked or function
        return results

    def _is_due(self, key: Any) -> bool:
        """Return True if chunks of a shape have cost enough to be traced."""
        total, last = self._seconds.get(key, (0.0, 0.0))
        is_new = key not in self._traced and key not in self._replays
        return is_new and last > 0 and total > max(_SECONDS, _CALLS * last)

    def _checked(
        self,
        replay: Callable[..., Any] | Exception,
        args: tuple[Any, ...],
        expected: Any,
        compute: Callable[..., list[Any]],
    ) -> Callable[..., Any] | None:
        """Return a replay if it gives what is expected; else None, and report the reason."""

        def check(_: int) -> Callable[..., Any]:  # in a thread, like the computation
            if isinstance(replay, Exception):
                raise replay
            pairs = zip(*map(pytree.tree_leaves, (replay(*args), expected)), strict=True)
            if not all(torch.allclose(a, b, 0, 0, equal_nan=True) for a, b in pairs):
                raise RuntimeError("the results differ")
            return replay

        try:
            return compute(check, [0])[0]
        except Exception as error:
            self._report(f"the step is not replayed from a trace: {first_line(error)}")
            return None


class _Recorder(TorchDispatchMode):
    """Record the operations of a computation as a graph, without what `torch.func` does.

    Attributes:
        graph: The operations.
        constants: Tensors that are neither inputs nor results, by their names in the graph.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.graph, self.constants = fx.Graph(), torch.nn.Module()
        self._nodes = WeakTensorKeyDictionary()
        self._given = {value.untyped_storage().data_ptr() for value in inputs} - {0}
        for index, value in enumerate(inputs):
            self._add(value, self.graph.placeholder(f"input{index}"))

    def _add(self, value: Tensor, node: fx.Node) -> None:
        self._nodes[value] = node
        node.meta["shape"] = value.shape

    def node(self, value: Tensor) -> fx.Node:
        """Return the node that computes a tensor."""
        if value not in self._nodes:
            if value.untyped_storage().data_ptr() in self._given:
                raise RuntimeError("an input is used without an operation")
            name = f"constant{len(self._nodes)}"
            self.constants.register_buffer(name, value.detach())
            self._add(value, self.graph.get_attr(name))
        return self._nodes[value]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _reads_values(func, args):
            raise RuntimeError(f"{func.name()} reads a value")
        call = pytree.tree_map_only(Tensor, self.node, (args, kwargs or {}))
        node = self.graph.call_function(func, *call)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._add(result, node)
        elif isinstance(result, tuple | list):
            for index, value in enumerate(result):
                if isinstance(value, Tensor):
                    self._add(value, self.graph.call_function(operator.getitem, (node, index)))
        return result


def _reads_values(func: Any, args: Any) -> bool:
    """Return True if shapes or values on the host depend on the values of tensors."""
    if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
        return any(mask is not None and mask.dtype == torch.bool for mask in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags})


def recorded(function: Callable[..., Any], *args: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the result of `function`, and what computes it for arguments of the same shapes.

    Args:
        function: Pure function of trees of tensors that reads no value on the host.
        args: Trees of tensors.
    """
    recorder = _Recorder(pytree.tree_leaves(args))
    with recorder:
        result = function(*args)
    outputs, spec = pytree.tree_flatten(result)
    recorder.graph.output([recorder.node(value) for value in outputs])
    _simplify(recorder.graph)
    module = fx.GraphModule(recorder.constants, recorder.graph)

    def replay(*args: Any) -> Any:
        with torch.no_grad():
            return pytree.tree_unflatten(module(*pytree.tree_leaves(args)), spec)

    return result, replay


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
        return node.meta["shape"] == node.args[0].meta["shape"]
    return node.target in (
        aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default
    )  # fmt: skip
