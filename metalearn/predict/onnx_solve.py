"""Translate torch's solution of linear systems to ONNX, which has no operator for it."""

from typing import Any

import torch
from onnxscript import FLOAT, ir, opset18, script

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


def _solve_ex(a: Any, b: Any, left: bool = True, check_errors: bool = False) -> Any:
    """Return the outputs of torch's operator; only the first, the solution, has a meaning."""
    if len(a.shape) != 2 or a.dtype != ir.DataType.FLOAT:
        raise NotImplementedError("only one linear system at a time, in float32, is translated")
    x = gauss_jordan(a, b)
    return x, op.Identity(x), op.Identity(x), op.Identity(x)


#: torch's operator and its translation, for torch.onnx.export.
TRANSLATIONS: dict[Any, Any] = {torch.ops.aten._linalg_solve_ex.default: _solve_ex}
