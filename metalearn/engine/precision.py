"""Compute the products of the backward pass in bfloat16 (`engine.precision=mixed`)."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from metalearn.engine.kernels import convolutions, ops

_PRODUCTS = {
    *(getattr(torch.ops.aten, name).default for name in ("mm", "bmm", "addmm", "baddbmm")),
    *(getattr(torch.ops.aten, name).default for name in ("convolution", "convolution_backward")),
    *(convolutions.conv, convolutions.conv_input, convolutions.conv_weight),
    *(ops.affine, ops.affine_weight),
}


class Bfloat16Products(TorchDispatchMode):
    """Round the factors of float32 convolutions and matrix products to bfloat16.

    Around the backward pass of a meta-gradient, all that is linear in the gradients is computed so:
    the backward pass of the queries, and the Hessian-vector products of inner steps. Losses,
    activations and inner gradients remain in float32, so no ReLU flips.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_single = all(arg.dtype == torch.float32 for arg in args if isinstance(arg, Tensor))
        if func not in _PRODUCTS or not is_single:
            return func(*args, **(kwargs or {}))
        rounded = pytree.tree_map_only(Tensor, Tensor.bfloat16, args)
        return pytree.tree_map_only(Tensor, Tensor.float, func(*rounded, **(kwargs or {})))
