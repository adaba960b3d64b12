"""Hallucination: a meta-learned generator adds examples to the support set."""

import dataclasses

import torch
from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.geometry import class_means, squared_distance
from metalearn.algorithms.protonet import distance_scale
from metalearn.config.fields import above, at_least
from metalearn.tasks import prng
from metalearn.tasks.types import Params, Spec, Support

#: Layers of the generator.
_LAYERS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hallucination(EmbeddingAlgorithm):
    """Prototypes of embeddings z_i and of generated ones G(z_i, e), e standard normal.

    G has three layers with ReLU and as many units as z, is the identity of z >= 0 at the start, and
    is trained with the backbone (Wang et al. 2018, 4 and 5.1).

    Departures: each example is the seed of `generated` ones (theirs: random seeds, up to a number
    per class); all seeds share the noise, so that their order does not matter.
    """

    generated: int = at_least(0)
    temperature: float | None = above(0)

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        identity, params = torch.eye(size, device=key.device), {}
        for layer in range(_LAYERS):
            noise = [torch.zeros_like(identity)] if layer == 0 else []
            params[f"head.weight{layer}"] = torch.cat([identity, *noise], 1)
            params[f"head.bias{layer}"] = torch.zeros(size, device=key.device)
        return params

    def generate(self, weights: Params, z: Tensor, noise: Tensor) -> Tensor:
        """Generate embeddings from seeds and noise, all [..., D]."""
        z = torch.cat([z, noise], -1)
        for layer in range(_LAYERS):
            z = (z @ weights[f"head.weight{layer}"].T + weights[f"head.bias{layer}"]).relu()
        return z

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Tensor:
        """Compute the class means [N, D]."""
        noise = prng.normal(key, (self.generated, z.shape[-1])).to(z.dtype)
        seeds = z.unsqueeze(1).expand(-1, self.generated, -1)
        more = self.generate(weights, seeds, noise.unsqueeze(0).expand_as(seeds))
        z = (z + more.sum(1)) / (1 + self.generated)
        return class_means(z, support.y, support.way)

    def compare(self, weights: Params, learned: Tensor, z: Tensor) -> Tensor:
        return -squared_distance(z, learned) / (self.temperature or distance_scale(z))
