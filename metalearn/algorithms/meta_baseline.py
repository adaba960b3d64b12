"""Meta-Baseline: cosine similarity to the class means, with a learned scale."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.geometry import class_means, cosine
from metalearn.config.fields import above
from metalearn.tasks.types import Params, Spec, Support


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaBaseline(EmbeddingAlgorithm):
    """logits = scale * cos(z, c_n), with the class means c_n (Chen et al. 2021, eq. 2 and 3).

    The first stage of the paper (Classifier-Baseline) trains on batches, the second on episodes,
    from the weights of the first (`train.start`).

    The logarithm of the scale (theirs: initially 10) is learned on episodes.
    """

    sources: ClassVar[tuple[str, ...]] = ("episodes", "batches")

    scale: float = above(0)

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        return {"head.log_scale": torch.full((), self.scale, device=key.device).log()}

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Tensor:
        return class_means(z, support.y, support.way)

    def compare(self, weights: Params, learned: Tensor, z: Tensor) -> Tensor:
        return weights["head.log_scale"].exp() * cosine(z, learned)
