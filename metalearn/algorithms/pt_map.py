"""PT-MAP: power-transformed features, and class means by optimal transport."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.algorithms.embedding import Examples
from metalearn.algorithms.geometry import squared_distance
from metalearn.algorithms.solvers import transport
from metalearn.algorithms.transductive import TransductiveHead, means_of
from metalearn.config.fields import above, at_least, between
from metalearn.tasks.types import Params

#: Added to features before their power; as in the authors' code.
_EPS = 1e-6


def power_transform(z: Tensor, power: float, eps: float = 0.0) -> Tensor:
    """Compute (z + eps)^power for features >= 0 (Tukey's ladder); others are mirrored at 0."""
    return torch.where(z < 0, -1.0, 1.0) * (z.abs() + eps).pow(power)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PTMAP(TransductiveHead):
    """Class means that move towards the means of their queries by optimal transport.

    Features: u = (z + eps)^power, then u / |u|, then minus the mean of all such features of the
    support set, or of the queries, then to norm 1 again (Hu et al. 2021, 3.2, and their code). P is
    the plan of `transport` with cost |u_q - c_n|^2 (eq. 4 and 5). A step moves c_n by `step_size`
    of the way to the mean of support examples and of queries with weights P_qn (eq. 6 and 7).
    logits = log P after the last step. Their QR decomposition of the features is a rotation, which
    changes no distance, so there is none.

    Departure: for negative features, whose power does not exist, -(|z| + eps)^power. Theirs: power
    beta 0.5, scale lambda 10, step size alpha 0.2, 20 steps, Sinkhorn iterations to an error of
    1e-6, at most 1,000.
    """

    power: float = above(0)
    scale: float = above(0)
    step_size: float = between(0, 1)
    steps: int = at_least(0)
    iterations: int = at_least(1)

    def compare(self, weights: Params, learned: Examples, z: Tensor) -> Tensor:
        support, z = learned._replace(z=self.features(learned.z)), self.features(z)
        means = means_of(support)
        for _ in range(self.steps):
            plan = transport(squared_distance(z, means), self.scale, self.iterations)
            total = support.y.T @ support.z + plan.T @ z
            estimate = total / (support.y.sum(0) + plan.sum(0)).unsqueeze(-1)
            means = means + self.step_size * (estimate - means)
        return transport(squared_distance(z, means), self.scale, self.iterations).log()

    def features(self, z: Tensor) -> Tensor:
        """Compute the features [M, D] of embeddings [M, D]."""
        u = F.normalize(power_transform(z, self.power, _EPS), dim=-1)
        return F.normalize(u - u.mean(0), dim=-1)
