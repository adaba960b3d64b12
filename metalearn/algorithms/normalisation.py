"""Normalisation at prediction: the run's `statistics` chooses which statistics normalise queries.

Legend of shapes: M support examples, Q queries, D features.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import vmap

from metalearn.algorithms.params import prefixed, select
from metalearn.backbones.base import Backbone
from metalearn.tasks.types import Params, State


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """Normalise by the query set, so predictions depend on each other (transductive)."""

    backbone: Backbone

    is_transductive: ClassVar[bool] = True
    #: True if meta-training collects population statistics.
    has_population: ClassVar[bool] = False

    def for_training(self, state: State) -> Params | None:
        """Return statistics for support sets and batches in meta-training; None for their own."""
        return None

    def for_support(self, state: State) -> Params | None:
        """Return the statistics for a support set at prediction, with an unadapted backbone.

        None means the support set's own.
        """
        return None

    def reference(self, params: Params, support_x: Tensor) -> Params:
        """Return what a learner stores of support x [M, *X], for the adapted backbone `params`."""
        return {}

    def embed_support(self, state: State, x: Tensor) -> tuple[Tensor, Params]:
        """Embed support x [M, *X] with the unadapted backbone; return [M, D] and `reference`."""
        net = select(state.params, "net")
        return self.backbone.embed(net, x, self.for_support(state))[0], self.reference(net, x)

    def embed_queries(
        self, state: State, params: Params, reference: Params, x: Tensor, key: Tensor | None
    ) -> tuple[Tensor, Params]:
        """Embed queries x [Q, *X] by backbone parameters, adapted or not.

        `state` has the population statistics; `reference` is the result of that method; `key`,
        int64 [] in meta-training, is for the backbone's noise. Return embeddings [Q, D], and
        statistics to add to the population's running averages.
        """
        return self.embed_batch(state, params, x, key)

    def embed_batch(
        self, state: State, params: Params, x: Tensor, key: Tensor | None
    ) -> tuple[Tensor, Params]:
        """Embed a meta-training batch x [B, *X]; results as in `embed_queries`."""
        given = self.for_training(state)
        if given is not None:
            return self.backbone.embed(params, x, given=given, key=key)[0], {}
        z, statistics = self.backbone.embed(params, x, collect=self.has_population, key=key)
        return z, prefixed(statistics, "net")


@dataclasses.dataclass(frozen=True)
class SupportStatistics(Normalisation):
    """Normalise by the support set's statistics under the adapted parameters (inductive)."""

    is_transductive: ClassVar[bool] = False

    def reference(self, params: Params, support_x: Tensor) -> Params:
        return self.backbone.embed(params, support_x, collect=True)[1]

    def embed_queries(
        self, state: State, params: Params, reference: Params, x: Tensor, key: Tensor | None
    ) -> tuple[Tensor, Params]:
        return self.backbone.embed(params, x, given=reference, key=key)[0], {}


@dataclasses.dataclass(frozen=True)
class SupportPlusOneStatistics(Normalisation):
    """Normalise by the support set and one query at a time (inductive; Nichol et al. 2018)."""

    is_transductive: ClassVar[bool] = False

    def reference(self, params: Params, support_x: Tensor) -> Params:
        return {"x": support_x}

    def embed_queries(
        self, state: State, params: Params, reference: Params, x: Tensor, key: Tensor | None
    ) -> tuple[Tensor, Params]:
        def embed_one(x_one: Tensor) -> Tensor:
            return self.backbone.embed(params, torch.cat([reference["x"], x_one[None]]), key=key)[
                0
            ][-1]

        return vmap(embed_one)(x), {}


@dataclasses.dataclass(frozen=True)
class PopulationStatistics(Normalisation):
    """Normalise predictions by running averages of meta-training (inductive).

    A frozen or external backbone uses its own in meta-training too.
    """

    is_transductive: ClassVar[bool] = False
    has_population: ClassVar[bool] = True

    def for_training(self, state: State) -> Params | None:
        is_fixed = self.backbone.is_frozen or self.backbone.is_external
        return self.for_support(state) if is_fixed else None

    def for_support(self, state: State) -> Params | None:
        return select(state.buffers, "net")

    def embed_queries(
        self, state: State, params: Params, reference: Params, x: Tensor, key: Tensor | None
    ) -> tuple[Tensor, Params]:
        if key is not None:
            return self.embed_batch(state, params, x, key)
        return self.backbone.embed(params, x, given=self.for_support(state))[0], {}


#: Normalisation by the value of `statistics`.
STATISTICS: dict[str, type[Normalisation]] = {
    "query": Normalisation,
    "support": SupportStatistics,
    "support_plus_one": SupportPlusOneStatistics,
    "population": PopulationStatistics,
}
