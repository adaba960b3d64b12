"""Training on labelled batches over all training classes, shared by the transfer methods.

Chen et al. (2019), "A closer look at few-shot classification".
"""

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.algorithms.base import Algorithm
from metalearn.algorithms.params import select
from metalearn.tasks import prng
from metalearn.tasks.types import Batch, Loss, Params, Spec, State


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchTraining(Algorithm):
    """Meta-train by cross-entropy over all training classes (`train.source=batches`).

    The classifier is "global.weight" [C, D] and "global.bias" [C]; tests on classes need neither.
    """

    sources: ClassVar[tuple[str, ...]] = ("batches",)

    def init_classifier(self, spec: Spec, size: int, key: Tensor) -> Params:
        """Create a linear layer from `size` features to all training classes, or to the values."""
        outputs = spec.train_classes or spec.way
        weight = prng.normal(key, (outputs, size)) * size**-0.5
        return {"global.weight": weight, "global.bias": torch.zeros(outputs, device=key.device)}

    def classify(self, params: Params, z: Tensor) -> Tensor:
        """Compute logits [B, C] over all training classes from embeddings z [B, D]."""
        return F.linear(z, params["global.weight"], params["global.bias"])

    def observe(self, buffers: Params, z: Tensor, y: Tensor) -> Params:
        """Return new values of buffers, from embeddings z [B, D] and labels of a batch."""
        return {}

    def batch_loss(self, state: State, batch: Batch, progress: Tensor) -> Loss:
        net = select(state.params, "net")
        z, statistics = self.normalisation.embed_batch(state, net, batch.x, batch.key)
        loss = self.family.query_loss(
            lambda params, _: (self.classify(params, z), statistics), state.params, batch, batch.key
        )
        return loss._replace(buffers=self.observe(state.buffers, z.detach(), batch.y))
