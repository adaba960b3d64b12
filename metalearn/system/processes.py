"""Several processes under `torchrun`: each does its share of the tasks, and all hold the same state after every step."""

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
    """Where this process stands among its siblings; rank 0 of size 1 where there are none."""

    rank: int = 0
    size: int = 1

    @property
    def leading(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, count: int) -> tuple[int, int]:
        """(first, number) of the tasks below `count` that are this process's own; the shares differ by one at most."""
        first, end = (count * rank // self.size for rank in (self.rank, self.rank + 1))
        return first, end - first

    def summed(self, tree: Any) -> Any:
        """The sum of a tree of floating-point tensors over all processes, in one message for each dtype."""
        if self.size == 1:
            return tree
        leaves, spec = pytree.tree_flatten(tree)
        found: list[torch.Tensor] = list(leaves)
        for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
            places = [place for place, leaf in enumerate(leaves) if leaf.dtype == dtype]
            message = torch.cat([leaves[place].flatten() for place in places])
            dist.all_reduce(message)
            parts = message.split([leaves[place].numel() for place in places])
            for place, part in zip(places, parts, strict=True):
                found[place] = part.view(leaves[place].shape)
        return pytree.tree_unflatten(found, spec)

    def placed(self, own: torch.Tensor, count: int) -> torch.Tensor:
        """The values of this process's share [own, …] at their places among `count` [count, …], the others' zero: `summed`
        makes them whole.
        """
        if self.size == 1:
            return own
        whole = own.new_zeros((count, *own.shape[1:]))
        first, number = self.share(count)
        whole[first : first + number] = own
        return whole

    def from_leader(self, content: Any) -> Any:
        """What the leading process has of this, in all of them."""
        if self.size == 1:
            return content
        parts = [content]
        dist.broadcast_object_list(parts, src=0)
        return parts[0]

    def any(self, condition: bool) -> bool:
        """Whether it holds in any process."""
        if self.size == 1:
            return condition
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, condition)
        return any(found)

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """What the leader makes here, like a cache, the others find."""
        if self.size > 1 and not self.leading:
            dist.barrier()
        try:
            yield
        finally:
            if self.size > 1 and self.leading:
                dist.barrier()


def local_rank() -> int:
    """The number of this process on its machine: the CUDA device it should use."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def joined(device: torch.device) -> Processes:
    """Joins the processes that torchrun has started (NCCL on CUDA, gloo on CPU); alone where it has started none."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where NCCL puts what it sends of plain objects
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return Processes(dist.get_rank(), dist.get_world_size())
