"""Explain out-of-memory errors with a chunk size that fits."""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from metalearn.engine.process import release_memory
from metalearn.system.errors import RunFailed, is_out_of_memory
from metalearn.tasks.types import Batch, Task


@contextlib.contextmanager
def suggest_chunk(
    attempt: Callable[[int, Any], Any], tasks: Task | Batch, chunk: int
) -> Iterator[None]:
    """Turn an out-of-memory error into a `RunFailed` that names an `engine.task_chunk` that fits.

    `attempt` maps (chunk, tasks) to a result; it is called again with smaller chunks than `chunk`.
    """
    try:
        yield
    except Exception as error:
        # A capture cannot try again. The warm-up has shown that the step fits without a graph.
        if not is_out_of_memory(error) or (
            torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        ):
            raise
        tried = min(chunk, tasks.key.shape[0])
        traceback.clear_frames(error.__traceback__)  # frames keep the tensors alive
    else:
        return
    release_memory()
    raise RunFailed(_advice(attempt, tasks, tried))


def _advice(attempt: Callable[[int, Any], Any], tasks: Task | Batch, tried: int) -> str:
    size = tried // 2
    while size:
        try:
            attempt(size, pytree.tree_map(lambda leaf, size=size: leaf[:size], tasks))
            return f"out of memory with {tried} tasks per chunk; engine.task_chunk={size} fits"
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)
        release_memory()
        size //= 2
    attempts = (
        "a single task" if tried == 1 else f"{tried} tasks per chunk, then with a single task"
    )
    return (
        f"out of memory with {attempts}; try engine.task_chunk=1, fewer inner steps or queries "
        "(episode.train.query), smaller images, or engine.rematerialise=true"
    )
