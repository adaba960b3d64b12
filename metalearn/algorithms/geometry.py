"""Class sums, class means and distances between embeddings.

Legend of shapes: M examples, N ways or other examples, D features.
"""

import torch.nn.functional as F
from torch import Tensor

from metalearn.tasks.metrics import one_hot


def class_sums(z_MD: Tensor, y_M: Tensor, way: int) -> Tensor:
    """Compute the sum of the embeddings of each class: [M, D], int64 [M] -> [N, D]."""
    return one_hot(y_M, way).to(z_MD.dtype).T @ z_MD


def class_means(z_MD: Tensor, y_M: Tensor, way: int) -> Tensor:
    """Compute the mean embedding of each class (Snell et al. 2017, eq. 1): -> [N, D].

    Shapes are those of `class_sums`. Each class occurs at least once; shots may differ.
    """
    return class_sums(z_MD, y_M, way) / one_hot(y_M, way).sum(0).unsqueeze(-1).to(z_MD.dtype)


def squared_distance(a_MD: Tensor, b_ND: Tensor) -> Tensor:
    """Compute squared Euclidean distances [M, N] between embeddings (Snell et al. 2017, 2.4).

    Raise ValueError if the feature sizes differ.
    """
    if a_MD.shape[-1] != b_ND.shape[-1]:
        raise ValueError(f"feature sizes differ: {a_MD.shape[-1]} and {b_ND.shape[-1]}")
    return a_MD.square().sum(-1, keepdim=True) - 2 * a_MD @ b_ND.T + b_ND.square().sum(-1)


def cosine(a_MD: Tensor, b_ND: Tensor) -> Tensor:
    """Compute cosine similarities between two sets of embeddings: [M, D], [N, D] -> [M, N]."""
    return F.normalize(a_MD, dim=-1) @ F.normalize(b_ND, dim=-1).T
