"""How an engine computes, and the rule that chooses it."""

import dataclasses
from typing import Any, TypeVar

from metalearn.algorithms.base import Algorithm
from metalearn.engine import kernels, process
from metalearn.tasks.types import Batch, Task

# On CPU, batching is not faster from this number of queries per task on, or beyond this number of
# input elements per chunk; measured in benchmarks/speed-cpu.md.
_FEW_QUERIES = 16
_CPU_CHUNK_ELEMENTS = 1 << 18
# Elements that a token counts as: its embedding is a vector.
_TOKEN_ELEMENTS = 64
# With convolution "direct", larger chunks have less overhead, and smaller ones stay in the caches.
_DIRECT_CHUNK_ELEMENTS, _DIRECT_CHUNK = 1 << 20, (2, 16)

_Plan = TypeVar("_Plan", bound="Plan")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How an engine batches an algorithm over tasks.

    Attributes:
        algorithm: The method.
        strategy: "vmap", "loop", "mixed" or "auto".
        chunk: Number of tasks processed at once, which bounds memory; 0 to choose automatically.
        precision: "fp32", "tf32", "mixed" (`precision.Bfloat16Products`) or "bf16" (autocast).
        convolution: See `Kernels`; for per-task weights. "auto" until `resolve`.
    """

    algorithm: Algorithm
    strategy: str
    chunk: int
    precision: str = "fp32"
    convolution: str = "plain"

    def has_own_loss(self, tasks: Task | Batch) -> bool:
        """Return True if the method overrides `loss`, so that "mixed" cannot be used for training.

        Batches count as well: they have no support set.
        """
        return isinstance(tasks, Batch) or type(self.algorithm).loss is not Algorithm.loss

    def resolve(self: _Plan, tasks: Task | Batch, count: int, training: bool) -> _Plan:
        """Return the plan with strategy and chunk chosen by a static rule.

        Args:
            tasks: Tasks or batches of the expected shape.
            count: Number of tasks per call.
            training: True for `step`, False for predictions only.
        """
        cpu = tasks.key.device.type == "cpu"
        support, query = (
            (None, tasks.x) if isinstance(tasks, Batch) else (tasks.support.x, tasks.query.x)
        )
        # Rollouts are chains of small operations.
        few = query.shape[1] < _FEW_QUERIES or not self.algorithm.family.predicts
        are_features = query.dim() == 3 and query.is_floating_point()
        iterates = self.algorithm.is_iterative and not self.algorithm.backbone.is_external
        convolution = self.convolution
        if convolution == "auto":
            is_fast = cpu and self.precision == "fp32" and kernels.build.library() is not None
            may_vmap = self.strategy in ("auto", "vmap") and iterates and count > 1
            suits = query.dim() == 5 and (may_vmap or self._may_pool)
            convolution = "direct" if is_fast and suits else "plain"
        pools = convolution == "direct" and self._may_pool
        strategy = self.strategy
        if strategy == "auto":
            if self.algorithm.backbone.is_external:
                strategy = "loop"
            elif not cpu or (count > 1 and (are_features or pools)):
                strategy = "vmap"
            elif count == 1 or not self.algorithm.is_iterative:
                strategy = "loop"  # a single task is already a large batch
            else:
                # "mixed" would loop over tasks for the predictions, where such a method computes.
                is_batched = few or self.algorithm.is_transductive or convolution == "direct"
                strategy = "vmap" if is_batched else "mixed"
        if strategy == "mixed" and training and self.has_own_loss(tasks):
            strategy = "vmap"
        batched = 0 if support is None else support[0].numel()
        batched += 0 if strategy == "mixed" else query[0].numel()
        batched *= 1 if query.is_floating_point() else _TOKEN_ELEMENTS
        chunk = self.chunk
        if not chunk and cpu and convolution == "direct":
            # As many chunks as the machine has cores; the number of threads changes no result.
            low, high = _DIRECT_CHUNK
            share = max(low, min(high, -(-count // process.ALL_THREADS)))
            chunk = max(1, min(share, _DIRECT_CHUNK_ELEMENTS // max(1, batched)))
        elif not chunk:
            chunk = max(1, _CPU_CHUNK_ELEMENTS // max(1, batched)) if cpu else count
        chunk = 1 if strategy == "loop" else min(chunk, count)
        return dataclasses.replace(self, strategy=strategy, convolution=convolution, chunk=chunk)

    @property
    def choices(self) -> dict[str, Any]:
        """Return strategy, chunk, precision and convolution as plain data."""
        return {
            name: getattr(self, name) for name in ("strategy", "chunk", "precision", "convolution")
        }

    @property
    def is_direct(self) -> bool:
        """Return True if all convolutions with weights per task use the operators of `kernels`."""
        return self.strategy == "vmap" and self.convolution == "direct"

    @property
    def is_pooled(self) -> bool:
        """Return True if blocks with pooling use the operators of `kernels`."""
        return self.convolution == "direct" and self._may_pool

    @property
    def _may_pool(self) -> bool:
        """Return True if the network has such blocks, and no second derivative is needed."""
        return self.algorithm.backbone.pools and not self.algorithm.takes_gradients
