"""Fully connected networks: Finn et al. (2017) on Omniglot without convolutions, and on sinusoids."""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn import random
from metalearn.backbones import normalisation
from metalearn.backbones.layers import ACTIVATIONS, init_weight
from metalearn.settings import above, at_least, choice, given_by_run
from metalearn.types import Kernels, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLP:
    """Linear layers of the sizes `hidden`, each with an optional normalisation and an activation."""

    hidden: list[int] = at_least(1)
    normalisation: str = choice("batch", "none")
    activation: str = choice(*ACTIVATIONS)
    eps: float = above(0)
    kernels: Kernels = given_by_run(Kernels())

    def init(self, input_shape: tuple[int, ...], key: Tensor) -> tuple[Params, Params]:
        params: Params = {}
        population: Params = {}
        width = math.prod(input_shape)
        for layer, features in enumerate(self.hidden):
            params[f"linear{layer}.weight"] = init_weight(random.fold_in(key, layer), features, width)
            if self.normalisation == "batch":
                affine, statistics = normalisation.init(f"norm{layer}", features, key.device)
                params |= affine
                population |= statistics
            else:
                params[f"linear{layer}.bias"] = torch.zeros(features, device=key.device)
            width = features
        return params, population

    def shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.hidden[-1] if self.hidden else math.prod(input_shape),)

    def embed(
        self, params: Params, x: Tensor, given: Params | None = None, collect: bool = False, key: Tensor | None = None
    ) -> tuple[Tensor, Params]:
        """x [B, *X] -> z [B, D]; see `metalearn.types.Backbone`."""
        x = x.flatten(1)
        statistics: Params = {}
        for layer in range(len(self.hidden)):
            x = F.linear(x, params[f"linear{layer}.weight"], params.get(f"linear{layer}.bias"))
            if self.normalisation == "batch":
                x, seen = normalisation.normalise(f"norm{layer}", params, x, given, collect, self.eps, self.kernels)
                statistics |= seen
            x = ACTIVATIONS[self.activation](x)
        return x, statistics
