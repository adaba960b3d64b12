"""What a list of scores says: means and 95% intervals."""

import math

import torch
from scipy.special import stdtrit
from torch import Tensor

from metalearn.types import Estimate


def estimate(scores: Tensor) -> Estimate:
    """Mean and half-width of the 95% interval of independent scores: t_(0.975, n-1) * s / sqrt(n) (Student 1908).

    Args: scores: [n], n >= 2; s is their sample standard deviation (n - 1).
    Raises: ValueError with fewer than two scores.
    """
    count = scores.numel()
    if count < 2:
        raise ValueError(f"an interval wants at least two scores, not {count}")
    var, mean = torch.var_mean(scores.double())
    half_width = float(stdtrit(count - 1, 0.975)) * math.sqrt(var.item() / count)
    return Estimate(mean.item(), half_width, count)
