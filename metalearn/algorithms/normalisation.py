"""Normalisation at prediction: by whose statistics queries are normalised, as the run's `statistics` chooses.

Legend: M support examples, Q queries, D features.
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
    """The query set's own statistics, so that predictions depend on each other (transductive)."""

    backbone: Backbone

    is_transductive: ClassVar[bool] = True
    #: Whether meta-training gathers population statistics.
    has_population: ClassVar[bool] = False

    def for_training(self, state: State) -> Params | None:
        """Return the statistics of support sets and batches while meta-training; None for their own."""
        return None

    def for_support(self, state: State) -> Params | None:
        """Return the statistics of a support set that an unadapted backbone embeds at prediction; None for its own."""
        return None

    def reference(self, params: Params, support_x: Tensor) -> Params:
        """Return what a learner must keep of its support set x [M, *X], for adapted backbone parameters."""
        return {}

    def embed_support(self, state: State, x: Tensor) -> tuple[Tensor, Params]:
        """Embed a support set x [M, *X] by the unadapted backbone: embeddings [M, D] and the reference."""
        net = select(state.params, "net")
        return self.backbone.embed(net, x, self.for_support(state))[0], self.reference(net, x)

    def embed_queries(
        self, state: State, params: Params, reference: Params, x: Tensor, key: Tensor | None
    ) -> tuple[Tensor, Params]:
        """Embed queries.

        Args:
            state: of the method, for its population statistics.
            params: of the backbone, adapted or not.
            reference: see `reference`.
            x: [Q, *X].
            key: int64 [] while meta-training, for the noise of the backbone; None for a prediction.

        Returns:
            Embeddings [Q, D], and statistics to fold into the population's.
        """
        return self.embed_batch(state, params, x, key)

    def embed_batch(
        self, state: State, params: Params, x: Tensor, key: Tensor | None
    ) -> tuple[Tensor, Params]:
        """Embed a batch x [B, *X] of meta-training: embeddings [B, D], and statistics to fold into the population's."""
        given = self.for_training(state)
        if given is not None:
            return self.backbone.embed(params, x, given=given, key=key)[0], {}
        z, seen = self.backbone.embed(params, x, collect=self.has_population, key=key)
        return z, prefixed(seen, "net")


@dataclasses.dataclass(frozen=True)
class SupportStatistics(Normalisation):
    """The statistics of the support set under the adapted parameters (inductive)."""

    is_transductive: ClassVar[bool] = False

    def reference(self, params: Params, support_x: Tensor) -> Params:
        return self.backbone.embed(params, support_x, collect=True)[1]

    def embed_queries(
        self, state: State, params: Params, reference: Params, x: Tensor, key: Tensor | None
    ) -> tuple[Tensor, Params]:
        return self.backbone.embed(params, x, given=reference, key=key)[0], {}


@dataclasses.dataclass(frozen=True)
class SupportPlusOneStatistics(Normalisation):
    """The statistics of the support set together with one query at a time (inductive; Nichol et al. 2018)."""

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
    """Running averages of meta-training (inductive); those of a frozen backbone are used throughout."""

    is_transductive: ClassVar[bool] = False
    has_population: ClassVar[bool] = True

    def for_training(self, state: State) -> Params | None:
        return self.for_support(state) if self.backbone.is_frozen else None

    def for_support(self, state: State) -> Params | None:
        return select(state.buffers, "net")

    def embed_queries(
        self, state: State, params: Params, reference: Params, x: Tensor, key: Tensor | None
    ) -> tuple[Tensor, Params]:
        if key is not None:
            return self.embed_batch(state, params, x, key)
        return self.backbone.embed(params, x, given=self.for_support(state))[0], {}


#: By the name that `statistics` gives.
STATISTICS: dict[str, type[Normalisation]] = {
    "query": Normalisation,
    "support": SupportStatistics,
    "support_plus_one": SupportPlusOneStatistics,
    "population": PopulationStatistics,
}
