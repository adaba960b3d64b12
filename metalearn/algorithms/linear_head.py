"""Methods whose model is the backbone with a linear head on top: y = W z + b."""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn import random
from metalearn.algorithms.base import Algorithm, prefixed, select
from metalearn.backbones.layers import init_weight
from metalearn.types import Params, Spec, State


class Adapted(NamedTuple):
    """A learner: the weights after adaptation, and what the normalisation at prediction needs."""

    params: Params
    reference: Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearHeadAlgorithm(Algorithm):
    """Backbone weights stand under "net.", the head's [N, D] and [N] under "head."."""

    targets: ClassVar[tuple[str, ...]] = ("class", "value")
    fixed_way: ClassVar[bool] = True
    class_equivariant: ClassVar[bool] = False  # the initial head differs from class to class

    def init(self, spec: Spec, key: Tensor) -> State:
        params, population = self.backbone.init(spec.input_shape, random.fold_in(key, 0))
        features = math.prod(self.backbone.shape(spec.input_shape))
        head = {
            "head.weight": init_weight(random.fold_in(key, 1), spec.way, features),
            "head.bias": torch.zeros(spec.way, device=key.device),
        }
        return State(prefixed(params, "net") | head, prefixed(population, "net"))

    def embed(self, params: Params, x: Tensor, given: Params) -> Tensor:
        """Embeddings [M, D] as adaptation sees them; given: `own_statistics`, by which x is normalised if there are any."""
        return self.backbone.embed(select(params, "net"), x, given or None)[0]

    def head(self, params: Params, z: Tensor) -> Tensor:
        """Outputs [M, N] for embeddings z [M, D]."""
        return F.linear(z, params["head.weight"], params["head.bias"])

    def adapted(self, params: Params, support_x: Tensor) -> Adapted:
        """The learner with these weights."""
        return Adapted(params, self.reference(select(params, "net"), support_x))

    def forward(self, state: State, learner: Adapted, x: Tensor, key: Tensor | None) -> tuple[Tensor, Params]:
        net = select(learner.params, "net")
        z, statistics = self.embed_queries(state, net, learner.reference, x, key)
        return self.head(learner.params, z), statistics
