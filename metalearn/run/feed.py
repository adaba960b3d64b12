"""Tasks that the host draws one step ahead, for inputs that are too large for the device."""

import contextlib

import torch
from torch.utils import _pytree as pytree

from metalearn.tasks.sampling import BatchSource
from metalearn.tasks.types import Batch, Task


class Feed:
    """The tasks of the next meta-step, in tensors at fixed addresses, as a CUDA graph reads them.

    While the device computes a step, the host draws the tasks of the next one, and a stream of
    their own copies, augments and normalises their inputs. Before the next step, these are copied
    into `tasks`.
    """

    def __init__(self, source: BatchSource, count: int, device: torch.device) -> None:
        self._source, self._count, self._device = source, count, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        self._ahead: tuple[int, Task | Batch] | None = None
        self.tasks: Task | Batch = pytree.tree_map(torch.clone, source.draw(0, count))

    def prefetch(self, first: int) -> None:
        """Draw tasks first .. first + count - 1 without waiting for the device."""
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            if self._stream is not None and self._copied is not None:
                # Memory of the tasks before may be used again from here on.
                self._stream.wait_event(self._copied)
            self._ahead = first, self._source.draw(first, self._count)

    def load(self, first: int) -> None:
        """Set `tasks` to those from `first` on, in place; draw them now unless prefetched."""
        if self._ahead is None or self._ahead[0] != first:
            self.prefetch(first)
        assert self._ahead is not None
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        drawn = self._ahead[1]
        pairs = list(zip(*map(pytree.tree_leaves, (self.tasks, drawn)), strict=True))
        if all(own.shape == value.shape for own, value in pairs):
            for own, value in pairs:
                own.copy_(value)
        else:  # a step with tasks of varying shapes is not captured
            self.tasks = drawn
        if self._stream is not None:
            self._copied = torch.cuda.current_stream(self._device).record_event()
        self._ahead = None
