"""Methods whose model is the backbone with a linear head on top: y = W z + b."""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.algorithms.base import Algorithm
from metalearn.algorithms.params import prefixed, select
from metalearn.backbones.layers import init_weight
from metalearn.tasks import prng
from metalearn.tasks.family import Net
from metalearn.tasks.types import Loss, Params, Query, Spec, State, Support


class Adapted(NamedTuple):
    """A learner: the weights after adaptation, and what normalisation needs at prediction."""

    params: Params
    reference: Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearHeadAlgorithm(Algorithm):
    """A backbone with a linear head.

    The backbone's weights are under "net.". The head's weight [N, D], its bias [N] and the
    parameters that the family adds are under "head.".
    """

    targets: ClassVar[tuple[str, ...]] = ("class", "value", "control")
    fixed_way: ClassVar[bool] = True
    adapts_in_steps: ClassVar[bool] = True
    is_iterative: ClassVar[bool] = True
    uses_inner_loss: ClassVar[bool] = True
    takes_gradients: ClassVar[bool] = True
    class_equivariant: ClassVar[bool] = False  # the initial head differs from class to class

    def init(self, spec: Spec, key: Tensor) -> State:
        params, population = self.backbone.init(spec.inputs, prng.fold_in(key, 0))
        features = math.prod(self.backbone.shape(spec.inputs))
        weight = init_weight(prng.fold_in(key, 1), spec.way, features)
        head = {"head.weight": weight, "head.bias": torch.zeros(spec.way, device=key.device)}
        extra = prefixed(self.family.init(spec, prng.fold_in(key, 2)), "head")
        return State(prefixed(params, "net") | head | extra, prefixed(population, "net"))

    def given(self, state: State) -> Params:
        """Return the statistics that normalise the support set in adaptation; {} for its own."""
        return self.normalisation.for_training(state) or {}

    def embed(self, params: Params, x: Tensor, given: Params) -> Tensor:
        """Compute embeddings [M, D] of x [M, *X] in adaptation; given: the result of `given`."""
        return self.network.embed(select(params, "net"), x, given or None)[0]

    def head(self, params: Params, z: Tensor) -> Tensor:
        """Compute outputs [M, N] for embeddings z [M, D]."""
        return F.linear(z, params["head.weight"], params["head.bias"])

    def adapted(self, params: Params, support_x: Tensor) -> Adapted:
        """Create the learner with these weights."""
        return Adapted(params, self.normalisation.reference(select(params, "net"), support_x))

    def forward(
        self, state: State, learner: Adapted, x: Tensor, key: Tensor | None
    ) -> tuple[Tensor, Params]:
        net = select(learner.params, "net")
        z, statistics = self.normalisation.embed_queries(state, net, learner.reference, x, key)
        return self.head(learner.params, z), statistics

    def query_loss(self, state: State, learner: Adapted, query: Query, key: Tensor) -> Loss:
        net = self._net(state, learner, key)
        return self.family.query_loss(net, learner.params, query, key)

    def score(self, state: State, learner: Adapted, query: Query, key: Tensor) -> Tensor:
        return self.family.score(self._net(state, learner, None), learner.params, query, key)

    def _net(self, state: State, learner: Adapted, key: Tensor | None) -> Net:
        """Return `forward` as a function of the adapted weights."""
        return lambda params, x: self.forward(state, learner._replace(params=params), x, key)

    def support_loss(self, params: Params, support: Support, given: Params, key: Tensor) -> Tensor:
        """Compute the family's loss [] of a support set; `given` as in `embed`; key: int64 []."""

        def net(params: Params, x: Tensor) -> tuple[Tensor, Params]:
            return self.head(params, self.embed(params, x, given)), {}

        return self.family.support_loss(net, params, support, key)
