"""Out of memory: what would fit."""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from metalearn.engine.process import release_memory
from metalearn.errors import RunFailed, ran_out
from metalearn.tasks.types import Batch, Task


@contextlib.contextmanager
def explained(
    attempt: Callable[[int, Any], Any], tasks: Task | Batch, chunk: int
) -> Iterator[None]:
    """Turns running out of memory into a line that names the `engine.task_chunk` that fits, found by trying.

    attempt: computes the given tasks, so many in flight together.
    """
    try:
        yield
    except Exception as error:
        # A capture cannot try again; who captures knows that the step fits without.
        if not ran_out(error) or (
            torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        ):
            raise
        tried = min(chunk, tasks.key.shape[0])
        traceback.clear_frames(error.__traceback__)  # they hold on to the memory in question
    else:
        return
    release_memory()
    raise RunFailed(_advice(attempt, tasks, tried))


def _advice(attempt: Callable[[int, Any], Any], tasks: Task | Batch, tried: int) -> str:
    size = tried // 2
    while size:
        try:
            attempt(size, pytree.tree_map(lambda leaf, size=size: leaf[:size], tasks))
            return f"out of memory with {tried} tasks in flight together; engine.task_chunk={size} fits"
        except Exception as error:
            if not ran_out(error):
                raise
            traceback.clear_frames(error.__traceback__)
        release_memory()
        size //= 2
    tasks_tried = "a single task" if tried == 1 else f"{tried} tasks in flight together"
    return (
        f"out of memory with {tasks_tried}, and not even one fits into what is left; try engine.task_chunk=1, fewer inner "
        "steps or queries (episode.train.query), smaller pictures, or engine.rematerialise=true"
    )
