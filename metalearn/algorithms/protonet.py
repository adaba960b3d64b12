"""Prototypical networks: the nearest class mean in embedding space.

Snell, Swersky and Zemel (2017), "Prototypical networks for few-shot learning".
"""

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn import random
from metalearn.algorithms.base import Algorithm, objective, prefixed, select
from metalearn.settings import above, choice
from metalearn.types import Labelled, Loss, Params, Spec, State, Task


class Prototypes(NamedTuple):
    """A learner: class means [N, D], and what the normalisation at prediction needs."""

    means: Tensor
    reference: Params


def class_means(z_MD: Tensor, y_M: Tensor, way: int) -> Tensor:
    """Mean embedding of each class (Snell et al. 2017, eq. 1); shots may differ between classes.

    Args: z_MD [M, D]; y_M int64 [M], each class at least once.
    Returns: [N, D].
    """
    member_MN = F.one_hot(y_M, way).to(z_MD.dtype)
    return (member_MN.T @ z_MD) / member_MN.sum(0).unsqueeze(-1)


def squared_distance(a_MD: Tensor, b_ND: Tensor) -> Tensor:
    """Squared Euclidean distances between two sets of embeddings (Snell et al. 2017, 2.4).

    Args: a_MD [M, D]; b_ND [N, D], same dtype and device.
    Returns: [M, N].
    Raises: ValueError if the feature sizes differ.
    """
    if a_MD.shape[-1] != b_ND.shape[-1]:
        raise ValueError(f"feature sizes differ: {a_MD.shape[-1]} and {b_ND.shape[-1]}")
    return a_MD.square().sum(-1, keepdim=True) - 2 * a_MD @ b_ND.T + b_ND.square().sum(-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProtoNet(Algorithm):
    """logits = -d(z, class mean) (Snell et al. 2017, eq. 2).

    distance: "squared_euclidean", or "cosine" similarity; temperature: divides the logits.
    Under `statistics=population`, support and query are embedded in one batch while training, as the authors' code does.
    """

    distance: str = choice("squared_euclidean", "cosine")
    temperature: float = above(0)

    def init(self, spec: Spec, key: Tensor) -> State:
        params, population = self.backbone.init(spec.input_shape, random.fold_in(key, 0))
        return State(prefixed(params, "net"), prefixed(population, "net"))

    def adapt(
        self,
        state: State,
        support: Labelled,
        unlabelled: Tensor | None = None,
        *,
        key: Tensor,
        steps: int | None = None,
    ) -> Prototypes:
        net = select(state.meta, "net")
        given = select(state.fixed, "net") if self.statistics == "population" else None
        z, _ = self.backbone.embed(net, support.x, given)
        return Prototypes(class_means(z, support.y, support.way), self.reference(net, support.x))

    def logits(self, z_QD: Tensor, means_ND: Tensor) -> Tensor:
        """Logits [Q, N] of embeddings [Q, D] for class means [N, D]."""
        if self.distance == "cosine":
            return F.normalize(z_QD, dim=-1) @ F.normalize(means_ND, dim=-1).T / self.temperature
        return -squared_distance(z_QD, means_ND) / self.temperature

    def forward(self, state: State, learner: Prototypes, x: Tensor, training: bool) -> tuple[Tensor, Params]:
        z, statistics = self.embed_queries(state, select(state.meta, "net"), learner.reference, x, training)
        return self.logits(z, learner.means), statistics

    def loss(self, state: State, task: Task, progress: Tensor) -> Loss:
        if self.statistics != "population":
            return super().loss(state, task, progress)
        support, query = task.support, task.query
        z, seen = self.backbone.embed(select(state.meta, "net"), torch.cat([support.x, query.x]), collect=True)
        z_support, z_query = z.split([support.x.shape[0], query.x.shape[0]])
        logits = self.logits(z_query, class_means(z_support, support.y, support.way))
        return self.scored(objective(logits, query.y), logits, query.y, prefixed(seen, "net"))
