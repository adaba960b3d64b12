"""LaplacianShot: similar queries get similar labels."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from metalearn.algorithms.bd_cspn import rectified
from metalearn.algorithms.centred import CentredHead
from metalearn.algorithms.embedding import Examples
from metalearn.algorithms.geometry import squared_distance
from metalearn.algorithms.transductive import means_of
from metalearn.config.fields import at_least, setting
from metalearn.tasks.types import Params

#: Scale of the cosines that rectify class means, as in the authors' code.
_COSINE_SCALE = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaplacianShot(CentredHead):
    """Distances to the class means, and the labels of each query's nearest queries.

    Labels y_q minimise sum_q y_q d_q + smoothness / 2 sum_qp w_qp |y_q - y_p|^2, with
    d_qn = |u_q - c_n|^2 for features u, and w_qp = 1 if p is among the nearest queries of q, else 0
    (Ziko et al. 2020, eq. 1). Each step sets y_q = softmax(-d_q + smoothness sum_p w_qp y_p)
    (eq. 12).

    `rectify` shifts queries and rectifies class means as BD-CSPN does; their code also moves
    support examples to the class with the nearest mean. Theirs: smoothness lambda chosen on
    validation classes from 0.1 to 1.5, 3 neighbours (2: their code counts the query itself), at
    most 20 steps.
    """

    is_transductive: ClassVar[bool] = True
    is_iterative: ClassVar[bool] = True

    smoothness: float = at_least(0)
    neighbours: int = at_least(1)
    steps: int = at_least(0)
    rectify: bool = setting()

    def compare(self, weights: Params, learned: Examples, z: Tensor) -> Tensor:
        z, means = self.normalised(weights, z), means_of(learned)
        if self.rectify:
            means, z = rectified(learned, z, _COSINE_SCALE)
        unary = -squared_distance(z, means)
        own = torch.eye(len(z), dtype=torch.bool, device=z.device)
        distance = squared_distance(z, z).masked_fill(own, torch.inf)
        nearest = distance.topk(min(self.neighbours, len(z) - 1), -1, largest=False).indices
        logits = unary
        for _ in range(self.steps):
            logits = unary + self.smoothness * logits.softmax(-1)[nearest].sum(1)
        return logits
