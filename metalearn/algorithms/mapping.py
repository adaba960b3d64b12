"""A mapping network: predict the weights of a classifier directly from the support set."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.geometry import class_means
from metalearn.backbones.layers import init_weight
from metalearn.config.fields import at_least
from metalearn.tasks import prng
from metalearn.tasks.types import Params, Spec, Support


@dataclasses.dataclass(frozen=True, kw_only=True)
class MappingNetwork(EmbeddingAlgorithm):
    """A network phi that maps the mean embedding c_n of a class to its weight and bias.

    [w_n, b_n] = [c_n, 0] + phi(c_n), logits = (w_n z + b_n) / sqrt(D) (Qiao et al. 2018, eq. 2, 6).

    Departures: the backbone is meta-learned with phi (theirs is trained beforehand and frozen). phi
    also predicts a bias. Its output is added to the mean, so the method starts as a classifier by
    inner products. These are divided by sqrt(D).

    Hidden layers have leaky ReLU. Without any, phi is linear, the paper's first choice.
    """

    hidden: list[int] = at_least(1)

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        """Create the layers of phi; the last one starts small."""
        params: Params = {}
        width = size
        widths = [*self.hidden, size + 1]
        for layer, features in enumerate(widths):
            weight = init_weight(prng.fold_in(key, layer), features, width)
            params[f"map{layer}.weight"] = 0.1 * weight if layer == len(widths) - 1 else weight
            params[f"map{layer}.bias"] = torch.zeros(features, device=key.device)
            width = features
        return params

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Tensor:
        """Predict the weight and bias of each class, [N, D + 1]."""
        means = class_means(z, support.y, support.way)
        out = means
        for layer in range(len(self.hidden) + 1):
            x = out if layer == 0 else F.leaky_relu(out)
            out = F.linear(x, weights[f"map{layer}.weight"], weights[f"map{layer}.bias"])
        return out + F.pad(means, (0, 1))

    def compare(self, weights: Params, learned: Tensor, z: Tensor) -> Tensor:
        return F.pad(z, (0, 1), value=1.0) @ learned.T * z.shape[-1] ** -0.5
