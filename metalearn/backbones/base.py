"""The contract of a backbone: a network that maps inputs to embeddings, independent of classes."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from metalearn.backbones.normalisation import Normaliser
from metalearn.config.fields import above, given_by_run, setting
from metalearn.tasks.types import InputSpec, Kernels, Params, Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backbone:
    """A network x -> embedding, written as pure functions of its parameters.

    A backbone implements `init`, `shape` and `forward`. `eps` is added to variances.
    """

    #: Kinds of input the network accepts: "images", "tokens", "features".
    input_kinds: ClassVar[tuple[str, ...]] = ("images",)
    #: True for a network of another library. It takes images in [0, 1] and standardises them
    #: itself, always uses its population statistics, and is applied to one task at a time.
    is_external: ClassVar[bool] = False
    #: True if the network has normalisations, so that the run's `statistics` matter.
    normalises: ClassVar[bool] = True
    #: True if parameters get no gradient and population statistics never change.
    is_frozen: ClassVar[bool] = False

    eps: float = above(0, default=1e-5)
    kernels: Kernels = given_by_run(Kernels())

    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer of the network's inputs; None for a network without texts."""
        return None

    def without_weights(self) -> "Backbone":
        """Return a copy that reads no pretrained weights, for a run whose checkpoint has them."""
        return self

    def pretraining(self, names: Sequence[str]) -> dict[str, Any]:
        """Return what the weights were trained on before the run; {} if on nothing.

        "data" is a name, or None if unknown; "shared" those of the class names that it contains, as
        far as names show.
        """
        return {}

    def init(self, inputs: InputSpec, key: Tensor) -> tuple[Params, Params]:
        """Return initial parameters and population statistics, on the device of `key`, int64 []."""
        raise NotImplementedError

    def shape(self, inputs: InputSpec) -> tuple[int, ...]:
        """Return the shape of an embedding before flattening: (C, H, W) of a map, or (D,)."""
        raise NotImplementedError

    def forward(self, params: Params, x: Tensor, norm: Normaliser, key: Tensor | None) -> Tensor:
        """Compute embeddings [B, D] of inputs x [B, *X].

        Args:
            params: Parameters from `init`, possibly adapted.
            x: Inputs.
            norm: Applies a normalisation by its name: `x = norm("norm0", x)`.
            key: Random key for noise such as dropout, int64 []; None for no noise.
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
        """Compute embeddings [B, D] and, if `collect`, the normalisation statistics of this batch.

        Args:
            params: Parameters from `init`, possibly adapted.
            x: Inputs, [B, *X].
            given: Normalisation statistics to use; None to use those of the batch.
            collect: Whether to return the statistics of the batch; else {}.
            key: Random key for noise in meta-training, int64 []; None for no noise.
            film: Task-specific scale and shift after each normalisation, shaped like `film()`.
        """
        if self.is_frozen:
            params = {name: value.detach() for name, value in params.items()}
        norm = Normaliser(params, given, collect, self.eps, self.kernels, film)
        return self.forward(params, x, norm, key), norm.seen

    def film(self, inputs: InputSpec, device: torch.device) -> Params:
        """Return zero scale and shift [C] for every normalisation, by name: the identity."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreezableBackbone(Backbone):
    """A network whose weights the setting `frozen` leaves as they are, in adaptation too."""

    frozen: bool = setting()

    @property
    def is_frozen(self) -> bool:  # type: ignore[override]
        """Return True for the setting `frozen`."""
        return self.frozen
