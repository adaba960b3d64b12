"""From functions of one task to functions of T tasks, and their meta-gradients; every speed trick lives in this package.

Strategies, alike in what they return:
  vmap   all of a task is batched over tasks;
  loop   task after task, each with plain convolutions, and its graph freed before the next;
  mixed  adaptation batched, queries task after task: with per-task weights a batched convolution becomes a grouped
         one, which is slow on CPU when there are many queries. Wants the default `loss`.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from metalearn.algorithms.base import Algorithm
from metalearn.engine import memory
from metalearn.tasks.types import Batch, Kernels, Loss, Params, Query, State, Task

# Queries of a task from which batching them no longer pays on CPU, and input elements batched together beyond which
# nothing is gained; benchmarks/speed-cpu.md is what these rest on.
_FEW_QUERIES = 16
_CPU_CHUNK_ELEMENTS = 1 << 18


class Step(NamedTuple):
    """What one meta-step needs, averaged over tasks (see `Loss`), and the loss of each task [T]."""

    gradients: Params
    logs: Params
    statistics: Params
    buffers: Params
    losses: Tensor


@dataclasses.dataclass(frozen=True)
class Engine:
    """Batches an algorithm over tasks.

    chunk: tasks in flight together (0: chosen here), a bound on memory; precision: "fp32", "tf32" or "bf16" (autocast);
    convolution: see `Kernels`, for weights of each task's own.
    """

    algorithm: Algorithm
    strategy: str
    chunk: int
    precision: str = "fp32"
    convolution: str = "plain"

    def has_own_loss(self, tasks: Task | Batch) -> bool:
        """Return True if the objective is not that of predicting the query set; then queries cannot be processed apart."""
        return isinstance(tasks, Batch) or type(self.algorithm).loss is not Algorithm.loss

    def resolved(self, tasks: Task | Batch, count: int, training: bool) -> "Engine":
        """The engine with strategy and chunk chosen for `count` tasks of this shape at a time, by a static rule.

        training: whether it is for `step`, and not for predictions alone.
        """
        cpu = tasks.key.device.type == "cpu"
        support, query = (
            (None, tasks.x) if isinstance(tasks, Batch) else (tasks.support.x, tasks.query.x)
        )
        few = query.shape[1] < _FEW_QUERIES
        strategy = self.strategy
        if strategy == "auto":
            if not cpu:
                strategy = "vmap"
            elif count == 1 or not self.algorithm.is_iterative:
                strategy = "loop"  # a task is one large batch already
            else:
                strategy = "vmap" if few else "mixed"
        if strategy == "mixed" and training and self.has_own_loss(tasks):
            strategy = "vmap"
        batched = 0 if support is None else support[0].numel()
        batched += 0 if strategy == "mixed" else query[0].numel()
        chunk = self.chunk or (max(1, _CPU_CHUNK_ELEMENTS // max(1, batched)) if cpu else count)
        return dataclasses.replace(
            self, strategy=strategy, chunk=1 if strategy == "loop" else min(chunk, count)
        )

    def at(self, progress: float) -> "Engine":
        """The engine once this share of meta-training, in [0, 1], is done."""
        return dataclasses.replace(self, algorithm=self.algorithm.stage(progress))

    def timed(self, state: State, tasks: Task | Batch) -> "Engine":
        """The engine with the faster convolution for weights of each task's own, by the clock. For a GPU."""
        progress = torch.zeros((), device=tasks.key.device)
        seconds: dict[str, float] = {}
        for convolution in ("plain", "unfold"):
            engine = dataclasses.replace(self, convolution=convolution)
            for number in range(4):
                torch.cuda.synchronize()
                start = time.perf_counter()
                engine.step(state, tasks, progress)
                torch.cuda.synchronize()
                if number:  # the first chooses kernels and allocates
                    seconds[convolution] = min(
                        time.perf_counter() - start, seconds.get(convolution, math.inf)
                    )
        return dataclasses.replace(self, convolution=min(seconds, key=seconds.__getitem__))

    @property
    def choices(self) -> dict[str, Any]:
        """All that was chosen, as plain data."""
        return {
            name: getattr(self, name) for name in ("strategy", "chunk", "precision", "convolution")
        }

    def step(
        self, state: State, tasks: Task | Batch, progress: Tensor, count: int | None = None
    ) -> Step:
        """Compute meta-gradients of the mean loss over T tasks or batches.

        Args:
            state: parameters and buffers.
            tasks: batched, a leading T.
            progress: [] in [0, 1].
            count: what sums over tasks are divided by, where these are only some of the step's tasks; None: T.

        Returns:
            Gradients named as `state.params`, logs, statistics and buffers, averaged over tasks.

        Raises:
            RunFailed: out of memory; the line says what would fit.
        """
        count = count or tasks.key.shape[0]

        def with_chunk(size: int, few: Task | Batch = tasks) -> Step:
            return dataclasses.replace(self, chunk=size)._step(state, few, progress, count)

        with memory.explained(with_chunk, tasks, self.chunk):
            return with_chunk(self.chunk)

    def _step(self, state: State, tasks: Task | Batch, progress: Tensor, count: int) -> Step:
        params = {name: value.detach().requires_grad_() for name, value in state.params.items()}
        leaves = list(params.values())
        total: Any = None
        values: list[Tensor] = []
        for chunk in _split(tasks, self.chunk):
            with self._precision(chunk):
                losses = self._losses(State(params, state.buffers), chunk, progress)
            gradients = torch.autograd.grad(
                losses.value.sum() / count, leaves, materialize_grads=True
            )
            part = (
                dict(zip(params, gradients, strict=True)),
                *(
                    _sum_over_tasks(part, count)
                    for part in (losses.logs, losses.statistics, losses.buffers)
                ),
            )
            total = part if total is None else pytree.tree_map(torch.add, total, part)
            values.append(losses.logs["loss"].detach())
        gradients, logs, statistics, buffers = total
        return Step(gradients, logs, statistics, buffers, torch.cat(values))

    def _precision(self, tasks: Task | Batch) -> contextlib.AbstractContextManager[Any]:
        if self.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(tasks.key.device.type, torch.bfloat16)

    def _with_kernels(self, batched: bool) -> Algorithm:
        """The algorithm, computed by what is fast and right under `vmap` (batched), or task by task."""
        kernels = Kernels(self.convolution if batched else "plain", fused_norm=not batched)
        backbone = dataclasses.replace(self.algorithm.backbone, kernels=kernels)
        return dataclasses.replace(self.algorithm, backbone=backbone)

    def _losses(self, state: State, tasks: Task | Batch, progress: Tensor) -> Loss:
        """Compute the losses of T tasks, each field with a leading T."""
        algorithm = self._with_kernels(batched=self.strategy == "vmap")
        loss: Any = algorithm.batch_loss if isinstance(tasks, Batch) else algorithm.loss
        if self.strategy == "vmap":
            return Loss(*vmap(loss, in_dims=(None, 0, None))(state, tasks, progress))
        if self.strategy == "loop" or isinstance(tasks, Batch):
            state = _channels_last(state)
            return _stack([loss(state, task, progress) for task in _unbind(tasks)])
        learners = self._adapt(state, tasks, algorithm.training_steps)
        each = zip(_unbind(learners), _unbind(tasks.query), tasks.key.unbind(), strict=True)
        return _stack(
            [algorithm.query_loss(state, learner, query, key) for learner, query, key in each]
        )

    def _adapt(self, state: State, tasks: Task, steps: int | None) -> Any:
        algorithm = self._with_kernels(batched=True)

        def adapt(task: Task) -> Any:
            return algorithm.adapt(state, task.support, key=task.key, steps=steps)

        return vmap(adapt)(tasks)

    def predictions(self, state: State, tasks: Task, steps: int | None = None) -> Tensor:
        """Compute predictions [T, Q, N] for the queries of T tasks after adapting to their support sets.

        Args:
            state: parameters and buffers.
            tasks: batched, a leading T.
            steps: of adaptation; None for the test's number.

        Raises:
            RunFailed: out of memory; the line says what would fit.
        """

        def answer(algorithm: Algorithm, learner: Any, query: Query, key: Tensor) -> Tensor:
            return algorithm.predict(state, learner, query.x)

        return self._answers(answer, state, tasks, steps)

    def scores(self, state: State, tasks: Task, steps: int | None = None) -> Tensor:
        """Compute one score for each of T tasks [T], by the family's metric; arguments as in `predictions`."""

        def answer(algorithm: Algorithm, learner: Any, query: Query, key: Tensor) -> Tensor:
            return algorithm.score(state, learner, query, key)

        return self._answers(answer, state, tasks, steps)

    @torch.no_grad()
    def _answers(
        self, answer: Callable[..., Tensor], state: State, tasks: Task, steps: int | None
    ) -> Tensor:
        """Adapt to T tasks and ask each learner; keeps no graph. answer: (algorithm, learner, query, key) -> a tensor."""

        def with_chunk(size: int, few: Task = tasks) -> Tensor:
            parts = []
            for chunk in _split(few, size):
                with self._precision(chunk):
                    parts.append(self._chunk_answers(answer, state, chunk, steps))
            return torch.cat(parts)

        with memory.explained(with_chunk, tasks, self.chunk):
            return with_chunk(self.chunk)

    def _chunk_answers(
        self, answer: Callable[..., Tensor], state: State, tasks: Task, steps: int | None
    ) -> Tensor:
        algorithm = self._with_kernels(batched=self.strategy == "vmap")

        def adapt_and_answer(task: Task) -> Tensor:
            learner = algorithm.adapt(state, task.support, key=task.key, steps=steps)
            return answer(algorithm, learner, task.query, task.key)

        if self.strategy == "vmap":
            found = vmap(adapt_and_answer)(tasks)
        elif self.strategy == "loop":
            found = torch.stack([adapt_and_answer(task) for task in _unbind(tasks)])
        else:
            each = zip(
                _unbind(self._adapt(state, tasks, steps)),
                _unbind(tasks.query),
                tasks.key.unbind(),
                strict=True,
            )
            found = torch.stack([answer(algorithm, *one) for one in each])
        return found.float() if found.dtype == torch.bfloat16 else found


def _split(tasks: Any, size: int) -> list[Any]:
    """Chunks of at most `size` tasks."""
    count = tasks.key.shape[0]
    if size >= count:
        return [tasks]
    starts = range(0, count, size)
    return [
        pytree.tree_map(lambda leaf, start=start: leaf[start : start + size], tasks)
        for start in starts
    ]


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
    """In float32 at least, whatever the precision of the pass."""
    return {
        name: value.detach().to(torch.promote_types(value.dtype, torch.float32)).sum(0) / count
        for name, value in values.items()
    }
