"""Relation network: a learned comparison of a query with each class.

Sung et al. (2018), "Learning to compare: Relation network for few-shot learning".
"""

import dataclasses
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.geometry import class_sums
from metalearn.backbones.layers import init_weight
from metalearn.errors import UserError
from metalearn.settings import at_least
from metalearn.tasks import prng
from metalearn.tasks.types import Loss, Params, Query, Spec, Support

#: Blocks of convolution in g.
_BLOCKS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelationNetwork(EmbeddingAlgorithm):
    """r = sigmoid(g(sum of the class's embeddings, embedding of the query)), trained to be 1 for the query's class and 0 for
    others by squared error (Sung et al. 2018, eq. 1 and 2); predictions are the r before the sigmoid.

    g sees both maps side by side: two blocks of 3x3 convolution with `filters` filters, normalisation, rectifier and 2x2
    max-pooling, then linear layers of the widths `hidden` and 1 (3.4). Embeddings that are vectors are maps of one position, and
    maps of one position have convolutions of 1x1 and no pooling.
    Departure: g normalises each pair by itself (layer normalisation). Theirs uses the statistics of all pairs of a batch, so that
    predictions would depend on each other.
    """

    uses_loss: ClassVar[bool] = False

    filters: int = at_least(1)
    hidden: list[int] = at_least(1)

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        channels, *extent = self.backbone.shape(spec.inputs)
        height, side = extent or (1, 1)
        if height != side:
            raise UserError(
                f"algo=relation compares square maps; the backbone gives {height}x{side}"
            )
        found: Params = {}
        width = 2 * channels
        for block in range(_BLOCKS):
            kernel = 3 if side > 1 else 1
            weight = init_weight(prng.fold_in(key, block), self.filters, width, kernel, kernel)
            found[f"relation.conv{block}.weight"] = weight
            found[f"relation.norm{block}.weight"] = torch.ones(self.filters, device=key.device)
            found[f"relation.norm{block}.bias"] = torch.zeros(self.filters, device=key.device)
            width, side = self.filters, max(1, side // 2)
        width *= side**2
        for layer, features in enumerate([*self.hidden, 1]):
            weight = init_weight(prng.fold_in(key, _BLOCKS + layer), features, width)
            found[f"relation.linear{layer}.weight"] = weight
            found[f"relation.linear{layer}.bias"] = torch.zeros(features, device=key.device)
            width = features
        return found

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Tensor:
        return class_sums(z, support.y, support.way)

    def compare(self, weights: Params, learned: Tensor, z: Tensor) -> Tensor:
        first = weights["relation.conv0.weight"]
        channels = first.shape[1] // 2
        side = math.isqrt(z.shape[-1] // channels)
        classes, queries = (part.unflatten(-1, (channels, side, side)) for part in (learned, z))
        # A convolution of two maps side by side is the sum of one of each, so that N + Q of them serve N Q pairs.
        pairs = _convolved(queries, first[:, channels:])[:, None] + _convolved(
            classes, first[:, :channels]
        )
        x = pairs.flatten(0, 1)
        for block in range(_BLOCKS):
            if block:
                x = _convolved(x, weights[f"relation.conv{block}.weight"])
            x = F.group_norm(
                x, 1, weights[f"relation.norm{block}.weight"], weights[f"relation.norm{block}.bias"]
            )
            x = _halved(x.relu())
        x = x.flatten(1)
        for layer in range(len(self.hidden) + 1):
            name = f"relation.linear{layer}"
            x = F.linear(
                x if layer == 0 else x.relu(), weights[f"{name}.weight"], weights[f"{name}.bias"]
            )
        return x.view(len(z), len(learned))

    def embedding_loss(
        self, weights: Params, learned: Tensor, z: Tensor, query: Query, statistics: Params
    ) -> Loss:
        logits = self.compare(weights, learned, z)
        target = F.one_hot(query.y, logits.shape[-1]).to(logits.dtype)
        return self.supervised.judge(
            (logits.sigmoid() - target).square().mean(), logits, query.y, statistics
        )


def _convolved(x: Tensor, weight: Tensor) -> Tensor:
    # Under vmap autocast does not reach convolutions, which may have got a bfloat16 sum.
    return F.conv2d(x.to(weight.dtype), weight, padding=weight.shape[-1] // 2)


def _halved(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2) if x.shape[-1] > 1 else x
