"""Rescale gradients of any size to inputs of a network."""

import torch
from torch import Tensor


def size_and_sign(x: Tensor, p: float) -> Tensor:
    """Compute size and sign of each number (Andrychowicz et al. 2016, A): [...] -> [..., 2].

    They are log |x| / p and sign(x) where |x| >= exp(-p), else -1 and exp(p) x.
    """
    is_large = x.abs() >= torch.e**-p
    size = torch.where(is_large, x.abs().clamp_min(torch.e**-p).log() / p, -1.0)
    return torch.stack([size, torch.where(is_large, x.sign(), x * torch.e**p)], -1)
