"""A mapping network: the support set turned directly into the weights of a classifier.

Qiao, Liu, Shen and Yuille (2018), "Few-shot image recognition by predicting parameters from activations".
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.geometry import class_means
from metalearn.backbones.layers import init_weight
from metalearn.settings import at_least
from metalearn.tasks import prng
from metalearn.tasks.types import Params, Spec, Support


@dataclasses.dataclass(frozen=True, kw_only=True)
class MappingNetwork(EmbeddingAlgorithm):
    """[w_n, b_n] = [c_n, 0] + phi(c_n), logits = (w_n z + b_n) / sqrt(D), c_n the mean embedding (Qiao et al. 2018, eq. 2 and 6).

    hidden: widths of phi's layers before its last, leaky rectifiers between; none: phi is linear, the paper's first choice.
    Departures: the backbone is meta-learned with phi (theirs is trained beforehand and frozen), phi also gives an offset, it
    adds to the mean itself, so that at first it is a classifier by inner products, and these are divided by sqrt(D).
    """

    hidden: list[int] = at_least(1)

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        found: Params = {}
        width = size
        widths = [*self.hidden, size + 1]
        for layer, features in enumerate(widths):
            weight = init_weight(prng.fold_in(key, layer), features, width)
            found[f"map{layer}.weight"] = 0.1 * weight if layer == len(widths) - 1 else weight
            found[f"map{layer}.bias"] = torch.zeros(features, device=key.device)
            width = features
        return found

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Tensor:
        """Weight and offset of each class [N, D + 1]."""
        means = class_means(z, support.y, support.way)
        found = means
        for layer in range(len(self.hidden) + 1):
            found = F.linear(
                found if layer == 0 else F.leaky_relu(found),
                weights[f"map{layer}.weight"],
                weights[f"map{layer}.bias"],
            )
        return found + F.pad(means, (0, 1))

    def compare(self, weights: Params, learned: Tensor, z: Tensor) -> Tensor:
        return F.pad(z, (0, 1), value=1.0) @ learned.T * z.shape[-1] ** -0.5
