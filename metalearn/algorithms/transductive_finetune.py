"""Transductive fine-tuning: certain predictions of the queries, on fixed embeddings."""

import dataclasses
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from metalearn.algorithms.embedding import Examples
from metalearn.algorithms.solvers import minimise
from metalearn.algorithms.transductive import TransductiveHead, means_of
from metalearn.config.fields import above, at_least, choice
from metalearn.tasks.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransductiveFineTuning(TransductiveHead):
    """A linear head that fits the support set and predicts the queries with low entropy.

    min_W mean_s cross-entropy + entropy_weight mean_q H(softmax(W u_q)) by Adam (Dhillon et al.
    2020, eq. 8), with u = relu(z) / |relu(z)|. w_n starts at the mean of u in class n, with norm 1
    (3.1).

    z are the embeddings, or as in the paper the logits of all training classes (`features`).

    Departures: only the head is fine-tuned (theirs: the whole network, with a bias); logits have a
    scale, because those of vectors of norm 1 are flat; a step is for both terms (theirs: one for
    each).

    Theirs: entropy weight 1, 25 epochs, and a rate of 5e-5 for the whole network.
    """

    takes_gradients: ClassVar[bool] = True

    features: str = choice("embeddings", "logits", default="embeddings")
    scale: float = above(0)
    entropy_weight: float = at_least(0)
    steps: int = at_least(0)
    lr: float = above(0)

    def compare(self, weights: Params, learned: Examples, z: Tensor) -> Tensor:
        parts = [learned.z, z]
        if self.features == "logits":
            parts = [self.classify(weights, part) for part in parts]
        support, z = (F.normalize(part.relu(), dim=-1) for part in parts)
        start = F.normalize(means_of(learned._replace(z=support)), dim=-1)

        def loss(w: Tensor) -> Tensor:
            log_p = self.scale * z @ w.T
            log_p = log_p.log_softmax(-1)
            entropy = -(log_p.exp() * log_p).sum(-1).mean()
            fit = -(learned.y * (self.scale * support @ w.T).log_softmax(-1)).sum(-1).mean()
            return fit + self.entropy_weight * entropy

        return self.scale * z @ minimise(loss, start, self.steps, self.lr).T
