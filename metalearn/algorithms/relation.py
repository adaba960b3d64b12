"""Relation network: a learned comparison of a query with each class.

Sung et al. (2018), "Learning to compare: Relation network for few-shot learning".
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn import random
from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.geometry import class_sums
from metalearn.backbones.layers import init_weight
from metalearn.settings import at_least
from metalearn.types import Labelled, Loss, Params, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelationNetwork(EmbeddingAlgorithm):
    """r = sigmoid(g(sum of the class's embeddings, embedding of the query)), trained to be 1 for the query's class and 0 for
    others by squared error (Sung et al. 2018, eq. 1 to 3); predictions are the r before the sigmoid.

    hidden: widths of g's layers before its last. Departure: the paper's g begins with two convolutions over feature maps; on
    28x28 pictures four halvings leave maps of one position, on which they are the linear layers that g has here.
    """

    hidden: list[int] = at_least(1)

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        found: Params = {}
        width = 2 * size
        for layer, features in enumerate([*self.hidden, 1]):
            found[f"relation{layer}.weight"] = init_weight(random.fold_in(key, layer), features, width)
            found[f"relation{layer}.bias"] = torch.zeros(features, device=key.device)
            width = features
        return found

    def learn(self, meta: Params, z: Tensor, support: Labelled) -> Tensor:
        return class_sums(z, support.y, support.way)

    def compare(self, meta: Params, learned: Tensor, z: Tensor) -> Tensor:
        pairs = torch.cat([learned.expand(len(z), -1, -1), z[:, None].expand(-1, len(learned), -1)], -1)
        for layer in range(len(self.hidden) + 1):
            pairs = F.linear(
                pairs if layer == 0 else pairs.relu(), meta[f"relation{layer}.weight"], meta[f"relation{layer}.bias"]
            )
        return pairs.squeeze(-1)

    def judged(self, meta: Params, learned: Tensor, z: Tensor, query: Labelled, statistics: Params) -> Loss:
        logits = self.compare(meta, learned, z)
        wanted = F.one_hot(query.y, query.way).to(logits.dtype)
        return self.scored((logits.sigmoid() - wanted).square().mean(), logits, query.y, statistics)
