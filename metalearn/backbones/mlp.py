"""Fully connected networks, as in Finn et al. (2017) for Omniglot and for sinusoids."""

import dataclasses
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.backbones import normalisation
from metalearn.backbones.base import Backbone
from metalearn.backbones.layers import ACTIVATIONS, init_weight
from metalearn.backbones.normalisation import Normaliser
from metalearn.config.fields import at_least, choice
from metalearn.tasks import prng
from metalearn.tasks.types import InputSpec, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLP(Backbone):
    """Linear layers, each with an optional normalisation and an activation.

    `initialisation` is the variance of the initial weights: "he", 2 / fan_in, or "xavier",
    2 / (fan_in + fan_out) (Glorot and Bengio 2010).
    """

    input_kinds: ClassVar[tuple[str, ...]] = ("images", "features")

    hidden: list[int] = at_least(1)
    normalisation: str = choice("batch", "none")
    activation: str = choice(*ACTIVATIONS)
    initialisation: str = choice("he", "xavier", default="he")

    @property
    def normalises(self) -> bool:  # type: ignore[override]
        """Return True unless the setting `normalisation` is "none"."""
        return self.normalisation != "none"

    def init(self, inputs: InputSpec, key: Tensor) -> tuple[Params, Params]:
        params: Params = {}
        population: Params = {}
        width = math.prod(inputs.shape)
        for layer, features in enumerate(self.hidden):
            weight = init_weight(prng.fold_in(key, layer), features, width)
            if self.initialisation == "xavier":
                weight = weight * math.sqrt(width / (width + features))
            params[f"linear{layer}.weight"] = weight
            if self.normalisation == "batch":
                affine, statistics = normalisation.init(f"norm{layer}", features, key.device)
                params |= affine
                population |= statistics
            else:
                params[f"linear{layer}.bias"] = torch.zeros(features, device=key.device)
            width = features
        return params, population

    def shape(self, inputs: InputSpec) -> tuple[int, ...]:
        return (self.hidden[-1] if self.hidden else math.prod(inputs.shape),)

    def forward(self, params: Params, x: Tensor, norm: Normaliser, key: Tensor | None) -> Tensor:
        x = x.flatten(1)
        for layer in range(len(self.hidden)):
            x = F.linear(x, params[f"linear{layer}.weight"], params.get(f"linear{layer}.bias"))
            x = ACTIVATIONS[self.activation](norm(f"norm{layer}", x))
        return x
