"""FEAT: class means that a transformer adapts to each other."""

import dataclasses
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm, Examples
from metalearn.algorithms.geometry import class_means, one_hot, squared_distance
from metalearn.algorithms.protonet import distance_scale
from metalearn.algorithms.transductive import means_of
from metalearn.backbones.layers import dropout
from metalearn.config.fields import above, at_least, between
from metalearn.tasks import prng
from metalearn.tasks.types import Loss, Params, Query, Spec, Support

#: Random stream of dropout; the backbone's noise uses the same key.
_STREAM = 100


class AdaptedMeans(NamedTuple):
    """Adapted class means [N, D], the support set, and a key for dropout in its loss."""

    means: Tensor
    support: Examples
    key: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class FEAT(EmbeddingAlgorithm):
    """logits = -|z - T(c)_n|^2 / temperature, with T self-attention over the class means c.

    T(c) = LayerNorm(c + W softmax(Q c (K c)' / sqrt(D)) V c + b) (Ye et al. 2020, 3.3). In
    meta-training, `contrast` times a cross-entropy is added: T is applied to all examples of each
    class, their means are centres, and each example should be nearest to its own centre (eq. 9).

    In meta-training, T has dropout of the softmax (`attention_dropout`, theirs: 0.1) and of W(...)
    + b (`dropout`, theirs: 0.5). Their `contrast` is 0.01 to 1. Departure: the backbone is trained
    from the start (theirs: first as a classifier; `train.start`).
    """

    accepts_soft_labels: ClassVar[bool] = False

    temperature: float | None = above(0)
    contrast: float = at_least(0)
    contrast_temperature: float | None = above(0)
    attention_dropout: float = between(0, 0.9, default=0.0)
    dropout: float = between(0, 0.9, default=0.0)

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        """Create the weights of T; linear layers are Xavier-normal, as in the authors' code."""
        params = {
            f"head.{name}": prng.normal(prng.fold_in(key, number), (size, size)) * size**-0.5
            for number, name in enumerate(("query", "key", "value", "output"))
        }
        zeros = torch.zeros(size, device=key.device)
        norm = {"head.norm.weight": zeros + 1, "head.norm.bias": zeros.clone()}
        return params | {"head.bias": zeros} | norm

    def transform(
        self, weights: Params, z: Tensor, sees: Tensor | None = None, key: Tensor | None = None
    ) -> Tensor:
        """Apply T to a set [M, D].

        Args:
            weights: Parameters of the state.
            z: The set.
            sees: Whether a row sees a column, bool [M, M]; None: all.
            key: Random key for dropout, int64 []; None for no dropout.
        """
        q, k, v = (z @ weights[f"head.{name}"].T for name in ("query", "key", "value"))
        score = q @ k.T * z.shape[-1] ** -0.5
        if sees is not None:
            score = score.masked_fill(~sees, -torch.inf)
        share = score.softmax(-1)
        if key is not None and self.attention_dropout:
            share = dropout(share, self.attention_dropout, prng.fold_in(key, 0))
        change = F.linear(share @ v, weights["head.output"], weights["head.bias"])
        if key is not None and self.dropout:
            change = dropout(change, self.dropout, prng.fold_in(key, 1))
        z = z + change
        return F.layer_norm(z, z.shape[-1:], weights["head.norm.weight"], weights["head.norm.bias"])

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> AdaptedMeans:
        means = class_means(z, support.y, support.way)
        own = Examples(z, one_hot(support.y, support.way).to(z.dtype))
        return AdaptedMeans(self.transform(weights, means), own, prng.fold_in(key, _STREAM))

    def compare(self, weights: Params, learned: AdaptedMeans, z: Tensor) -> Tensor:
        return -squared_distance(z, learned.means) / (self.temperature or distance_scale(z))

    def embedding_loss(
        self, weights: Params, learned: AdaptedMeans, z: Tensor, query: Query, statistics: Params
    ) -> Loss:
        means_key, contrast_key = (prng.fold_in(learned.key, number) for number in range(2))
        if self.attention_dropout or self.dropout:
            means = self.transform(weights, means_of(learned.support), key=means_key)
            learned = learned._replace(means=means)
        loss = super().embedding_loss(weights, learned, z, query, statistics)
        if not self.contrast:
            return loss
        z, own = torch.cat([learned.support.z, z]), learned.support.y
        y = torch.cat([own, one_hot(query.y, own.shape[1]).to(own.dtype)])
        adapted = self.transform(weights, z, y @ y.T > 0, contrast_key)
        centres = y.T @ adapted / y.sum(0).unsqueeze(-1)
        scale = self.contrast_temperature or distance_scale(z)
        contrast = F.cross_entropy(-squared_distance(z, centres) / scale, y)
        return loss._replace(value=loss.value + self.contrast * contrast)
