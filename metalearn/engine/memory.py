"""Choose how many episodes to test at once; explain out-of-memory errors with what fits."""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from metalearn.engine import process
from metalearn.engine.process import release_memory
from metalearn.system.errors import RunFailed, is_out_of_memory
from metalearn.tasks.types import Batch, Task

# On a CPU: bytes of inputs that are drawn at once, episodes for each core, and the most bytes.
_CPU_BYTES, _CPU_EPISODES, _MOST_CPU_BYTES = 1 << 24, 16, 1 << 30
# On a GPU: episodes whose memory is measured, and the most episodes at once.
_MEASURED, _MOST = 8, 1024


def episodes_at_once(
    device: torch.device, episode: Task, evaluate: Callable[[int], object] | None = None
) -> int:
    """Return how many episodes to test at once.

    On a CPU a multiple of 16 for each core: as many as have 16 MiB of inputs, but at least once, if
    their inputs need no more than 1 GiB. On a GPU as many as half of the free memory suffices for,
    by the peak of 8 episodes, and at most 1,024.

    Args:
        device: Device of the run.
        episode: An episode of the expected shape, with a leading T of 1.
        evaluate: Evaluates a number of episodes, on a GPU.
    """
    if device.type != "cuda" or evaluate is None:
        own = sum(leaf.nbytes for leaf in pytree.tree_leaves(episode))
        least = _CPU_EPISODES * process.ALL_THREADS
        count = max(_CPU_BYTES // own // least, 1) * least  # a rest would leave cores without work
        return max(1, min(count, _MOST_CPU_BYTES // own))
    release_memory()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    evaluate(_MEASURED)
    required = max(1, (torch.cuda.max_memory_allocated(device) - before) // _MEASURED)
    release_memory()
    return max(1, min(torch.cuda.mem_get_info(device)[0] // 2 // required, _MOST))


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
