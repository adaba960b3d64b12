"""Run chunks of tasks in threads that each use one core."""

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def in_order(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Return `function` of each item, computed with as many threads as torch uses.

    Each item is computed by one thread on its own, so the results do not depend on their number.
    """
    count = torch.get_num_threads()
    # torch may report more threads in a worker, which must not wait for other workers.
    if count == 1 or getattr(_local, "is_worker", False):
        return [function(item) for item in items]

    def on_one_core(item: Any) -> Any:
        torch.set_num_threads(1)  # also MKL's, which all threads of a process share
        return function(item)

    try:
        return list(_pool(count).map(on_one_core, items))
    finally:
        torch.set_num_threads(count)


def alone(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Return `function` of each item, one after the other, each with all threads of torch."""
    return [function(item) for item in items]


_local = threading.local()


def _start() -> None:
    _local.is_worker = True


@functools.cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "metalearn", _start)
