"""BD-CSPN: prototypes rectified by the queries, and queries shifted to the support set."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.algorithms.embedding import Examples
from metalearn.algorithms.geometry import cosine
from metalearn.algorithms.transductive import TransductiveHead, means_of
from metalearn.config.fields import above, at_least
from metalearn.tasks.types import Params


def rectified(
    learned: Examples, z: Tensor, scale: float, most: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return class means c' [N, D] that queries rectify, and shifted queries [Q, D].

    Queries are shifted by (mean of support - mean of queries). c_n' = mean over i in class n of
    w_in z_i, w_i = softmax_n(scale cos(z_i, c_n)). Members are the support examples of the class
    and the queries that are most similar to its mean c_n, at most `most`, with the largest weights.
    """
    z = z + learned.z.mean(0) - z.mean(0)
    means = means_of(learned)
    weight, own = ((scale * cosine(part, means)).softmax(-1) for part in (z, learned.z))
    is_member = weight == weight.amax(-1, keepdim=True)
    if most is not None and most < len(z):
        score = torch.where(is_member, weight, -1)
        is_member = is_member & (score >= score.topk(most, 0).values[-1])
    member = torch.cat([learned.y, is_member.to(z.dtype)])
    share = member * torch.cat([own, weight]) / member.sum(0)
    return share.T @ torch.cat([learned.z, z]), z


@dataclasses.dataclass(frozen=True, kw_only=True)
class BDCSPN(TransductiveHead):
    """logits = scale cos(z', c_n'), with shifted queries z' and rectified class means c'.

    Both as `rectified` computes them from embeddings of norm 1 (Liu et al. 2020, 3.2 and 3.3).

    `most` is Z, the greatest number of queries that join a class; None: all that are nearest to it.
    Their scale is 10.
    """

    scale: float = above(0)
    most: int | None = at_least(1)

    def compare(self, weights: Params, learned: Examples, z: Tensor) -> Tensor:
        support = learned._replace(z=F.normalize(learned.z, dim=-1))
        means, z = rectified(support, F.normalize(z, dim=-1), self.scale, self.most)
        return self.scale * cosine(z, means)
