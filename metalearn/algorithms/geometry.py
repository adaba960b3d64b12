"""Sums and means of classes and distances between embeddings, which several methods share."""

import torch.nn.functional as F
from torch import Tensor


def class_sums(z_MD: Tensor, y_M: Tensor, way: int) -> Tensor:
    """Sum of the embeddings of each class: [M, D], int64 [M] -> [N, D]."""
    return F.one_hot(y_M, way).to(z_MD.dtype).T @ z_MD


def class_means(z_MD: Tensor, y_M: Tensor, way: int) -> Tensor:
    """Mean embedding of each class (Snell et al. 2017, eq. 1); shots may differ between classes.

    Args: z_MD [M, D]; y_M int64 [M], each class at least once.
    Returns: [N, D].
    """
    return class_sums(z_MD, y_M, way) / F.one_hot(y_M, way).sum(0).unsqueeze(-1).to(z_MD.dtype)


def squared_distance(a_MD: Tensor, b_ND: Tensor) -> Tensor:
    """Squared Euclidean distances between two sets of embeddings (Snell et al. 2017, 2.4).

    Args: a_MD [M, D]; b_ND [N, D], same dtype and device.
    Returns: [M, N].
    Raises: ValueError if the feature sizes differ.
    """
    if a_MD.shape[-1] != b_ND.shape[-1]:
        raise ValueError(f"feature sizes differ: {a_MD.shape[-1]} and {b_ND.shape[-1]}")
    return a_MD.square().sum(-1, keepdim=True) - 2 * a_MD @ b_ND.T + b_ND.square().sum(-1)


def cosine(a_MD: Tensor, b_ND: Tensor) -> Tensor:
    """Cosines between two sets of embeddings: [M, D], [N, D] -> [M, N]."""
    return F.normalize(a_MD, dim=-1) @ F.normalize(b_ND, dim=-1).T
