"""Heads on embeddings that are centred by the mean of the training classes, with norm 1."""

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm, Examples
from metalearn.config.fields import choice
from metalearn.tasks.types import Params, Spec, State, Support

#: Decay of the sums over embeddings of the training batches: about the last 100 count.
_DECAY = 0.99


@dataclasses.dataclass(frozen=True, kw_only=True)
class CentredHead(EmbeddingAlgorithm):
    """A head on features u of embeddings z, whose backbone is trained on batches.

    UN: u = z. L2N: u = z / |z|. CL2N: u = (z - m) / |z - m|, with the mean m of the embeddings of
    the training classes (Wang et al. 2019, 2.2), here over the last training batches.
    """

    sources: ClassVar[tuple[str, ...]] = ("batches",)

    features: str = choice("UN", "L2N", "CL2N")

    def init(self, spec: Spec, key: Tensor) -> State:
        """Create the parameters, and sum and number of the embeddings of training batches."""
        state = super().init(spec, key)
        size = state.params["global.weight"].shape[1]
        total, count = torch.zeros(size, device=key.device), torch.zeros((), device=key.device)
        return State(state.params, state.buffers | {"head.sum": total, "head.count": count})

    def observe(self, buffers: Params, z: Tensor, y: Tensor) -> Params:
        old = {name: _DECAY * buffers[name] for name in ("head.sum", "head.count")}
        return {"head.sum": old["head.sum"] + z.sum(0), "head.count": old["head.count"] + len(z)}

    def normalised(self, weights: Params, z: Tensor) -> Tensor:
        """Compute the features [M, D] of embeddings [M, D]."""
        if self.features == "CL2N":
            z = z - weights["head.sum"] / weights["head.count"].clamp_min(1)
        return z if self.features == "UN" else F.normalize(z, dim=-1)

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Examples:
        return super().learn(weights, self.normalised(weights, z), support, key)
