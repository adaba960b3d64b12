"""Run several processes under `torchrun`.

Each computes its share of the tasks; all hold the same state after every step.
"""

import atexit
import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree


@dataclasses.dataclass(frozen=True)
class Processes:
    """The rank of this process and the number of processes; 0 of 1 without torchrun."""

    rank: int = 0
    size: int = 1

    @property
    def is_leader(self) -> bool:
        """Return True in the process that writes."""
        return self.rank == 0

    def share(self, count: int) -> tuple[int, int]:
        """Return this process's share of `count` tasks: the first one, and their number.

        The sizes differ by one at most.
        """
        first, end = (count * rank // self.size for rank in (self.rank, self.rank + 1))
        return first, end - first

    def all_reduce_sum(self, tree: Any) -> Any:
        """Sum a tree of floating-point tensors over all processes, in one message per dtype."""
        if self.size == 1:
            return tree
        leaves, spec = pytree.tree_flatten(tree)
        sums: list[torch.Tensor] = list(leaves)
        for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
            indices = [index for index, leaf in enumerate(leaves) if leaf.dtype == dtype]
            message = torch.cat([leaves[index].flatten() for index in indices])
            dist.all_reduce(message)
            parts = message.split([leaves[index].numel() for index in indices])
            for index, part in zip(indices, parts, strict=True):
                sums[index] = part.view(leaves[index].shape)
        return pytree.tree_unflatten(sums, spec)

    def scatter(self, own: torch.Tensor, count: int) -> torch.Tensor:
        """Place this process's values [own, …] in a tensor of all tasks [count, …], else 0.

        `all_reduce_sum` then gives the values of all processes.
        """
        if self.size == 1:
            return own
        values = own.new_zeros((count, *own.shape[1:]))
        first, number = self.share(count)
        values[first : first + number] = own
        return values

    def from_leader(self, content: Any) -> Any:
        """Return the leading process's object in all processes."""
        if self.size == 1:
            return content
        parts = [content]
        dist.broadcast_object_list(parts, src=0)
        return parts[0]

    def any(self, condition: bool) -> bool:
        """Return True if the condition is true in any process."""
        if self.size == 1:
            return condition
        conditions: list[Any] = [None] * self.size
        dist.all_gather_object(conditions, condition)
        return any(conditions)

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """Run the block in the leading process first, so that the others find its files."""
        if self.size > 1 and not self.is_leader:
            dist.barrier()
        try:
            yield
        finally:
            if self.size > 1 and self.is_leader:
                dist.barrier()


def local_rank() -> int:
    """Return the number of this process on its machine: the CUDA device that it should use."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def join_processes(device: torch.device) -> Processes:
    """Join the processes that torchrun started (NCCL on CUDA, gloo on CPU), if any."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)  # NCCL sends Python objects through this device
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return Processes(dist.get_rank(), dist.get_world_size())
