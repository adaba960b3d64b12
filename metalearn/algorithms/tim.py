"""TIM: maximise the mutual information between queries and their predicted labels."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.algorithms.embedding import Examples
from metalearn.algorithms.geometry import squared_distance
from metalearn.algorithms.solvers import minimise
from metalearn.algorithms.transductive import TransductiveHead, means_of
from metalearn.config.fields import above, at_least, choice
from metalearn.tasks.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class TIM(TransductiveHead):
    """Class weights w, initially the class means, that minimise a loss of support set and queries.

    logits = -temperature / 2 |w_n - z|^2 for embeddings of norm 1 (Boudiaf et al. 2020, eq. 2).
    min supervised CE(support) - H(mean_q p_q) + conditional mean_q H(p_q) (eq. 3).

    `solver` is "adm", the closed-form alternating steps of prop. 1 (theirs: 150), or "gradient",
    Adam (theirs: 1,000 steps with a rate of 1e-4). Theirs: temperature 15, weights 0.1.
    """

    solver: str = choice("adm", "gradient")
    temperature: float = above(0)
    supervised_weight: float = at_least(0)
    conditional_weight: float = at_least(0)
    steps: int = at_least(0)
    lr: float = above(0)

    @property
    def takes_gradients(self) -> bool:  # type: ignore[override]
        """Return True for the solver that does."""
        return self.solver == "gradient"

    def compare(self, weights: Params, learned: Examples, z: Tensor) -> Tensor:
        support, z = learned._replace(z=F.normalize(learned.z, dim=-1)), F.normalize(z, dim=-1)
        if self.solver == "adm":
            return self.alternate(support, z)
        w = minimise(
            lambda w: self.objective(w, support, z), means_of(support), self.steps, self.lr
        )
        return self.logits(w, z)

    def logits(self, w: Tensor, z: Tensor) -> Tensor:
        """Compute logits [Q, N] of embeddings [Q, D] for class weights w [N, D]."""
        return -self.temperature / 2 * squared_distance(z, w)

    def objective(self, w: Tensor, support: Examples, z: Tensor) -> Tensor:
        """Compute the loss []."""
        log_p = self.logits(w, z).log_softmax(-1)
        marginal = log_p.exp().mean(0)
        conditional = -(log_p.exp() * log_p).sum(-1).mean()
        supervised = -(support.y * self.logits(w, support.z).log_softmax(-1)).sum(-1).mean()
        return (
            self.supervised_weight * supervised
            + (marginal * marginal.log()).sum()
            + self.conditional_weight * conditional
        )

    def alternate(self, support: Examples, z: Tensor) -> Tensor:
        """Compute the logits [Q, N] of queries [Q, D] after the steps of proposition 1.

        If embeddings of all classes nearly coincide, as in an untrained network, the steps amplify
        differences without bound: results then depend on rounding.

        Every w is a sum of embeddings, w_n = sum_i a_in z_i, so a step needs only a [M + Q, N] and
        the inner products of the embeddings.
        """
        every, y = torch.cat([support.z, z]), support.y
        gram = every @ every.T
        a = torch.cat([y / y.sum(0), y.new_zeros(len(z), y.shape[1])])
        own = self.supervised_weight / (1 + self.conditional_weight)
        weight = torch.cat([y.new_full((len(y), 1), own), y.new_full((len(z), 1), len(y) / len(z))])

        def logits(a: Tensor) -> Tensor:
            inner = gram @ a
            square = (a * inner).sum(0) + gram.diagonal().unsqueeze(-1)  # |w|^2 + |z|^2
            return self.temperature * (inner - square / 2)

        for _ in range(self.steps):
            p = logits(a).softmax(-1)
            q = p[len(y) :].pow(1 + self.conditional_weight)
            q = q / q.sum(0).sqrt()
            target = torch.cat([y, q / q.sum(-1, keepdim=True)])
            a = (weight * (target - p) + (weight * p).sum(0) * a) / (weight * target).sum(0)
        return logits(a)[len(y) :]
