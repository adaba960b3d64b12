"""Relation network: a learned comparison of a query with each class."""

import dataclasses
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.geometry import class_sums, one_hot
from metalearn.backbones.layers import init_weight
from metalearn.config.fields import at_least
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.types import Loss, Params, Query, Spec, Support

#: Convolution blocks in g.
_BLOCKS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelationNetwork(EmbeddingAlgorithm):
    """A network g that compares the embedding of a query with the summed embeddings of a class.

    r = sigmoid(g(class sum, query)) is trained by squared error to be 1 for the query's class and 0
    for others (Sung et al. 2018, eq. 1 and 2). Predictions are r before the sigmoid.

    The input of g is both feature maps, concatenated. g has two blocks of 3x3 convolution with
    `filters` filters, normalisation, ReLU and 2x2 max-pooling, then linear layers of widths
    `hidden` and 1 (3.4). An embedding vector is a 1x1 map. For 1x1 maps, convolutions are 1x1 and
    there is no pooling.

    Departure: g normalises each pair alone (layer normalisation). Theirs uses the statistics of all
    pairs of a batch, so predictions would depend on each other.
    """

    uses_loss: ClassVar[bool] = False
    accepts_soft_labels: ClassVar[bool] = False

    filters: int = at_least(1)
    hidden: list[int] = at_least(1)

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        channels, *extent = self.backbone.shape(spec.inputs)
        height, side = extent or (1, 1)
        if height != side:
            raise UserError(
                f"algo=relation: the backbone's maps are {height}x{side}; they must be square"
            )
        params: Params = {}
        width = 2 * channels
        for block in range(_BLOCKS):
            kernel = 3 if side > 1 else 1
            weight = init_weight(prng.fold_in(key, block), self.filters, width, kernel, kernel)
            params[f"relation.conv{block}.weight"] = weight
            params[f"relation.norm{block}.weight"] = torch.ones(self.filters, device=key.device)
            params[f"relation.norm{block}.bias"] = torch.zeros(self.filters, device=key.device)
            width, side = self.filters, max(1, side // 2)
        width *= side**2
        for layer, features in enumerate([*self.hidden, 1]):
            weight = init_weight(prng.fold_in(key, _BLOCKS + layer), features, width)
            params[f"relation.linear{layer}.weight"] = weight
            params[f"relation.linear{layer}.bias"] = torch.zeros(features, device=key.device)
            width = features
        return params

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Tensor:
        return class_sums(z, support.y, support.way)

    def compare(self, weights: Params, learned: Tensor, z: Tensor) -> Tensor:
        first = weights["relation.conv0.weight"]
        channels = first.shape[1] // 2
        side = math.isqrt(z.shape[-1] // channels)
        classes, queries = (part.unflatten(-1, (channels, side, side)) for part in (learned, z))
        # The convolution of two concatenated maps is the sum of one convolution of each map.
        # So N + Q convolutions are enough for N Q pairs.
        pairs = _convolve(queries, first[:, channels:])[:, None] + _convolve(
            classes, first[:, :channels]
        )
        x = pairs.flatten(0, 1)
        for block in range(_BLOCKS):
            if block:
                x = _convolve(x, weights[f"relation.conv{block}.weight"])
            x = F.group_norm(
                x, 1, weights[f"relation.norm{block}.weight"], weights[f"relation.norm{block}.bias"]
            )
            x = F.max_pool2d(x.relu(), 2) if x.shape[-1] > 1 else x.relu()
        x = x.flatten(1)
        for layer in range(len(self.hidden) + 1):
            name = f"relation.linear{layer}"
            x = F.linear(
                x if layer == 0 else x.relu(), weights[f"{name}.weight"], weights[f"{name}.bias"]
            )
        return x.view(z.shape[0], learned.shape[0])

    def embedding_loss(
        self, weights: Params, learned: Tensor, z: Tensor, query: Query, statistics: Params
    ) -> Loss:
        logits = self.compare(weights, learned, z)
        target = one_hot(query.y, logits.shape[-1]).to(logits.dtype)
        return self.supervised.make_loss(
            (logits.sigmoid() - target).square().mean(), logits, query.y, statistics
        )


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    # Under vmap, autocast does not apply to convolutions, and x may be a sum in bfloat16.
    return F.conv2d(x.to(weight.dtype), weight, padding=weight.shape[-1] // 2)
