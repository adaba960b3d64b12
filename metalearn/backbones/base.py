"""The contract of a backbone: a function from inputs to embeddings that knows nothing of classes."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from metalearn.backbones.normalisation import Normaliser
from metalearn.settings import above, given_by_run
from metalearn.tasks.types import InputSpec, Kernels, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backbone:
    """A network x -> embedding, as pure functions of its parameters. A backbone writes `init`, `shape` and `forward`.

    eps: added to variances in normalisations; kernels: set by the engine.
    """

    #: Kinds of input the network takes: "images", "tokens", "features".
    input_kinds: ClassVar[tuple[str, ...]] = ("images",)

    eps: float = above(0, default=1e-5)
    kernels: Kernels = given_by_run(Kernels())

    @property
    def normalises(self) -> bool:
        """Whether the network has normalisations, so that the run's `statistics` matter."""
        return True

    @property
    def is_frozen(self) -> bool:
        """Whether no gradient reaches the parameters and the population statistics never change."""
        return False

    def without_weights(self) -> "Backbone":
        """Return the network without pretrained weights to read, for a run whose checkpoint has them."""
        return self

    def init(self, inputs: InputSpec, key: Tensor) -> tuple[Params, Params]:
        """Return parameters and initial population statistics, on the key's device. key: int64 []."""
        raise NotImplementedError

    def shape(self, inputs: InputSpec) -> tuple[int, ...]:
        """Return the shape of an embedding before it is flattened: (C, H, W) of a map, or (D,)."""
        raise NotImplementedError

    def forward(self, params: Params, x: Tensor, norm: Normaliser, key: Tensor | None) -> Tensor:
        """Compute embeddings.

        Args:
            params: as `init` returns them, perhaps adapted.
            x: [B, *X].
            norm: applies a normalisation: `x = norm("norm0", x)`.
            key: int64 [], for noise such as dropout; None for none.

        Returns:
            Embeddings [B, D].
        """
        raise NotImplementedError

    def embed(
        self,
        params: Params,
        x: Tensor,
        given: Params | None = None,
        collect: bool = False,
        key: Tensor | None = None,
        film: Params | None = None,
    ) -> tuple[Tensor, Params]:
        """Compute embeddings [B, D] of x [B, *X] and, if `collect`, the normalisation statistics of this batch.

        Args:
            params: as `init` returns them, perhaps adapted.
            x: [B, *X].
            given: the statistics to use; None for those of the batch.
            collect: whether to return the statistics of the batch.
            key: int64 [] while meta-training, for noise; None for none.
            film: a task's own scale and shift after each normalisation, as `film` returns them; None for none.
        """
        if self.is_frozen:
            params = {name: value.detach() for name, value in params.items()}
        norm = Normaliser(params, given, collect, self.eps, self.kernels, film)
        return self.forward(params, x, norm, key), norm.seen

    def film(self, inputs: InputSpec, device: torch.device) -> Params:
        """Return a scale and a shift of zero, [C] each, for every normalisation, by name: they change nothing."""
        meta = torch.device("meta")
        params, _ = self.without_weights().init(
            inputs, torch.zeros((), dtype=torch.int64, device=meta)
        )
        norm = Normaliser(params)
        dtype = torch.int64 if inputs.kind == "tokens" else torch.float32
        self.forward(params, torch.zeros((2, *inputs.shape), dtype=dtype, device=meta), norm, None)
        return {
            f"{name}.{part}": torch.zeros(features, device=device)
            for name, features in norm.features.items()
            for part in ("scale", "shift")
        }
