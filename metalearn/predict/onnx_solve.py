"""Translate torch's solution of linear systems to ONNX, which has no operator for it."""

from typing import Any

import torch
from onnxscript import FLOAT, ir, opset18, script
from torch.utils._python_dispatch import TorchDispatchMode

op: Any = opset18


@script(default_opset=op)
def gauss_jordan(a: FLOAT, b: FLOAT) -> FLOAT:
    """Solve a [M, M] x = b [M, N] without pivoting, for a symmetric positive definite a."""
    size = op.Squeeze(op.Shape(a, start=0, end=1), op.Constant(value_ints=[0]))
    joined = op.Concat(a, b, axis=1)
    for step in range(size):
        at = op.Reshape(step, op.Constant(value_ints=[1]))
        row = op.Gather(joined, at, axis=0)
        row = row / op.Gather(row, at, axis=1)
        column = op.Gather(joined, at, axis=1)
        is_row = op.Cast(op.Equal(op.Range(0, size, 1), step), to=1)
        is_row = op.Unsqueeze(is_row, op.Constant(value_ints=[1]))
        # Other rows lose their share of this row; this row is replaced.
        joined = joined - (column - is_row * column) @ row + is_row * (row - joined)
    start = op.Reshape(size, op.Constant(value_ints=[1]))
    end = op.Constant(value_ints=[2**31 - 1])
    return op.Slice(joined, start, end, op.Constant(value_ints=[1]))


def _check_solve(shape: Any, is_float32: bool) -> None:
    if len(shape) != 2 or not is_float32:
        raise NotImplementedError("only one linear system at a time, in float32, is translated")


def _solve_ex(a: Any, b: Any, left: bool = True, check_errors: bool = False) -> Any:
    """Return the outputs of torch's operator; only the first, the solution, has a meaning."""
    _check_solve(a.shape, a.dtype == ir.DataType.FLOAT)
    x = gauss_jordan(a, b)
    return x, op.Identity(x), op.Identity(x), op.Identity(x)


class LinearAlgebra(TorchDispatchMode):
    """Refuse linear algebra that has no translation, before torch's exporter traces for minutes."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call an operator, or raise NotImplementedError."""
        if func in TRANSLATIONS:
            _check_solve(args[0].shape, args[0].dtype == torch.float32)
        elif "linalg_" in func.name() and "norm" not in func.name():
            raise NotImplementedError(f"ONNX has no operator like torch's {func.name()}")
        return func(*args, **(kwargs or {}))


#: torch's operator and its translation, for torch.onnx.export.
TRANSLATIONS: dict[Any, Any] = {torch.ops.aten._linalg_solve_ex.default: _solve_ex}
