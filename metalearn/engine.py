"""From functions of one task to functions of T tasks, and their meta-gradients; every speed trick lives here.

Strategies, alike in what they return:
  vmap   all of a task is batched over tasks;
  loop   task after task, each with plain convolutions, and its graph freed before the next;
  mixed  adaptation batched, queries task after task: with per-task weights a batched convolution becomes a grouped
         one, which is slow on CPU when there are many queries. Wants the default `loss`.
"""

import ctypes
import dataclasses
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from metalearn.algorithms.base import Algorithm
from metalearn.types import Loss, Params, Score, State, Task

# Queries of a task from which `mixed` wins on CPU, and input elements batched together beyond which nothing is gained;
# `make benchmark-speed` measures what these rest on.
_MIXED_FROM_QUERIES = 16
_CPU_CHUNK_ELEMENTS = 1 << 18


def prepare_process(device: torch.device, threads: int) -> None:
    """Settings of the whole process: CPU threads (0: all), and an allocator that keeps what it has.

    glibc returns every large block to the kernel and faults its pages in again at the next step; kept, steps
    of large convolutions are faster (ProtoNet 1.5 times, when it was tried).
    """
    if threads:
        torch.set_num_threads(threads)
    if device.type == "cpu" and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # musl has none
            m_trim_threshold, m_mmap_threshold = -1, -3
            libc.mallopt(m_mmap_threshold, 1 << 30)
            libc.mallopt(m_trim_threshold, (1 << 31) - 1)


class Step(NamedTuple):
    """What one meta-step needs: mean over tasks of the gradients, the logs and the statistics."""

    gradients: Params
    logs: Params
    statistics: Params


@dataclasses.dataclass(frozen=True)
class Engine:
    """Batches an algorithm over tasks. chunk: tasks in flight together (0: chosen here), a bound on memory."""

    algorithm: Algorithm
    strategy: str
    chunk: int

    def resolved(self, tasks: Task, count: int) -> "Engine":
        """The engine with strategy and chunk chosen for `count` tasks of this shape at a time, by a static rule."""
        device = tasks.key.device.type
        queries = tasks.query.x.shape[1]
        own_loss = type(self.algorithm).loss is not Algorithm.loss
        strategy = self.strategy
        if strategy == "auto":
            mixed = device == "cpu" and not own_loss and queries >= _MIXED_FROM_QUERIES
            strategy = "mixed" if mixed else "vmap"
            if device == "cpu" and count == 1:
                strategy = "loop"
        if strategy == "mixed" and own_loss:
            strategy = "vmap"
        batched = tasks.support.x[0].numel() + (0 if strategy == "mixed" else tasks.query.x[0].numel())
        chunk = self.chunk or (max(1, _CPU_CHUNK_ELEMENTS // max(1, batched)) if device == "cpu" else count)
        return dataclasses.replace(self, strategy=strategy, chunk=chunk)

    def step(self, state: State, tasks: Task, progress: Tensor, count: int | None = None) -> Step:
        """Meta-gradients of the mean loss over T tasks.

        Args: tasks: batched, a leading T; progress: [] in [0, 1]; count: what sums over tasks are divided by, where these
          are only some of the step's tasks; None: T.
        Returns: gradients alike `state.meta`, logs and statistics, all averaged over tasks.
        """
        count = count or tasks.key.shape[0]
        meta = {name: value.detach().requires_grad_() for name, value in state.meta.items()}
        leaves = list(meta.values())
        total: Step | None = None
        for chunk in _split(tasks, 1 if self.strategy == "loop" else self.chunk):
            losses = self._losses(State(meta, state.fixed), chunk, progress)
            gradients = torch.autograd.grad(losses.value.sum() / count, leaves, materialize_grads=True)
            part = Step(
                dict(zip(meta, gradients, strict=True)),
                _sum_over_tasks(losses.logs, count),
                _sum_over_tasks(losses.statistics, count),
            )
            total = part if total is None else pytree.tree_map(torch.add, total, part)
        assert total is not None
        return total

    def _losses(self, state: State, tasks: Task, progress: Tensor) -> Loss:
        """Losses of T tasks, each field with a leading T."""
        algorithm = self.algorithm
        if self.strategy == "vmap":
            return Loss(*vmap(algorithm.loss, in_dims=(None, 0, None))(state, tasks, progress))
        if self.strategy == "loop":
            state = _channels_last(state)
            return _stack([algorithm.loss(state, task, progress) for task in _unbind(tasks)])
        learners = self._adapt(state, tasks, algorithm.training_steps)
        pairs = zip(_unbind(learners), _unbind(tasks.query), strict=True)
        return _stack([algorithm.query_loss(state, learner, query) for learner, query in pairs])

    def _adapt(self, state: State, tasks: Task, steps: int | None) -> Any:
        def adapt(task: Task) -> Any:
            return self.algorithm.adapt(state, task.support, task.unlabelled, key=task.key, steps=steps)

        return vmap(adapt)(tasks)

    @torch.no_grad()
    def predictions(self, state: State, tasks: Task, steps: int | None = None) -> Tensor:
        """Predictions [T, Q, N] for the queries of T tasks after adapting to their support sets; keeps no graph."""

        def predict(task: Task) -> Tensor:
            learner = self.algorithm.adapt(state, task.support, task.unlabelled, key=task.key, steps=steps)
            return self.algorithm.predict(state, learner, task.query.x)

        parts = []
        for chunk in _split(tasks, self.chunk):
            if self.strategy == "vmap":
                parts.append(vmap(predict)(chunk))
            elif self.strategy == "loop":
                parts.append(torch.stack([predict(task) for task in _unbind(chunk)]))
            else:
                learners = self._adapt(state, chunk, steps)
                pairs = zip(_unbind(learners), _unbind(chunk.query), strict=True)
                parts.append(torch.stack([self.algorithm.predict(state, learner, q.x) for learner, q in pairs]))
        return torch.cat(parts)

    def scores(self, state: State, tasks: Task, score: Score, steps: int | None = None) -> Tensor:
        """One score a task [T]."""
        return score.of(self.predictions(state, tasks, steps), tasks.query.y)


def _split(tasks: Task, size: int) -> list[Task]:
    """Chunks of at most `size` tasks."""
    count = tasks.key.shape[0]
    if size >= count:
        return [tasks]
    starts = range(0, count, size)
    return [pytree.tree_map(lambda leaf, start=start: leaf[start : start + size], tasks) for start in starts]


def _unbind(tree: Any) -> list[Any]:
    """The T trees of a batched tree."""
    leaves, spec = pytree.tree_flatten(tree)
    rows = zip(*(leaf.unbind(0) for leaf in leaves), strict=True)
    return [_channels_last(pytree.tree_unflatten(list(row), spec)) for row in rows]


def _channels_last(tree: Any) -> Any:
    """Pictures and convolution weights in the layout that plain convolutions on CPU are fastest in."""

    def convert(leaf: Tensor) -> Tensor:
        return leaf.contiguous(memory_format=torch.channels_last) if leaf.dim() == 4 else leaf

    return pytree.tree_map(convert, tree)


def _stack(losses: list[Loss]) -> Loss:
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), losses[0], *losses[1:])


def _sum_over_tasks(values: Params, count: int) -> Params:
    return {name: value.detach().sum(0) / count for name, value in values.items()}
