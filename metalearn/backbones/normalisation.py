"""Batch normalisation as a function of explicit statistics; the only place that normalises."""

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.types import Kernels, Params


def init(name: str, features: int, device: torch.device) -> tuple[Params, Params]:
    """Scale 1 and shift 0 under `name`, and population statistics of a standard normal input."""
    one, zero = torch.ones(features, device=device), torch.zeros(features, device=device)
    return (
        {f"{name}.weight": one, f"{name}.bias": zero},
        {f"{name}.mean": zero.clone(), f"{name}.var": one.clone()},
    )


def normalise(
    name: str, params: Params, x: Tensor, given: Params | None, collect: bool, eps: float, kernels: Kernels
) -> tuple[Tensor, Params]:
    """(x - mean) / sqrt(var + eps) * weight + bias for each channel (Ioffe and Szegedy 2015).

    Args:
      x: [B, C, ...]; given: the statistics to use, or None for those of x itself (biased variance).
      collect: also return the statistics of x, differentiable in x.
    Returns: the normalised x, and {"<name>.mean": [C], "<name>.var": [C]} or {}.
    """
    weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
    shape = (1, -1) + (1,) * (x.dim() - 2)
    collected: Params = {}
    if collect:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), axes, correction=0)
        collected = {f"{name}.mean": mean, f"{name}.var": var}
    if given is None:
        if kernels.fused_norm:
            return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps), collected
        # The affine part stands outside, because under vmap the second derivative of F.batch_norm is wrong when its
        # weight differs between tasks (torch 2.15; tests/test_backbones.py holds it).
        standard = F.batch_norm(x, None, None, training=True, eps=eps)
        return standard * weight.view(shape) + bias.view(shape), collected
    # Written out, because F.batch_norm treats given statistics as constants and gradients must pass through them.
    scale = weight * torch.rsqrt(given[f"{name}.var"] + eps)
    shift = bias - given[f"{name}.mean"] * scale
    return x * scale.view(shape) + shift.view(shape), collected
