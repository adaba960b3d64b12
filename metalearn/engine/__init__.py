"""Batch functions of one task over T tasks and compute meta-gradients.

Every speed optimisation is in this package. The strategies return the same results:
  vmap   batches adaptation and queries over tasks.
  loop   processes one task at a time with plain convolutions, and frees its graph before the next.
  mixed  batches adaptation and loops over tasks for the queries. With per-task weights, a batched
         convolution becomes a grouped one, which is slow on CPU with many queries. Requires the
         default `loss`.
On CPU, `vmap` uses the operators of `kernels`: chunks run in threads, and training replays a trace
of the step (`replay`).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from metalearn.algorithms.base import Algorithm
from metalearn.engine import capture, kernels, memory, precision, replay, threads
from metalearn.engine.plan import Plan
from metalearn.engine.trees import channels_last, split, stack, unbind
from metalearn.tasks.types import CLASS_ERRORS, Batch, Kernels, Loss, Params, Query, State, Task


class Step(NamedTuple):
    """Gradients and `Loss` fields averaged over tasks, and values of each task.

    These are the losses [T], and the errors of classes [T, 2, N] if the logs have `CLASS_ERRORS`.
    """

    gradients: Params
    logs: Params
    statistics: Params
    buffers: Params
    losses: Tensor
    class_errors: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Engine(Plan):
    """Batches an algorithm over tasks, as its plan says."""

    def at(self, progress: float) -> "Engine":
        """Return the engine for a given progress of meta-training, in [0, 1]."""
        return dataclasses.replace(self, algorithm=self.algorithm.stage(progress))

    def time_convolutions(
        self, state: State, tasks: Task | Batch, reason_not_captured: str | None
    ) -> "Engine":
        """Return the engine with the convolution that is faster for per-task weights.

        Each is timed as training will run it: as a CUDA graph, unless there is a reason not to.
        """
        progress, device = torch.zeros((), device=tasks.key.device), tasks.key.device
        seconds: dict[str, float] = {}
        for convolution in ("plain", "unfold"):
            engine = dataclasses.replace(self, convolution=convolution)
            step = functools.partial(engine.step, state, tasks, progress)
            captured = capture.Captured(
                step, lambda: None, device, reason_not_captured, lambda line: None
            )
            seconds[convolution] = capture.fastest_seconds(captured, device)
        return dataclasses.replace(self, convolution=min(seconds, key=seconds.__getitem__))

    def step(
        self,
        state: State,
        tasks: Task | Batch,
        progress: Tensor,
        count: int | None = None,
        replays: replay.Replays | None = None,
    ) -> Step:
        """Compute meta-gradients of the mean loss over T tasks or batches.

        Args:
            state: Parameters and buffers.
            tasks: Tasks or batches with a leading T.
            progress: [] in [0, 1].
            count: Divisor of sums over tasks, for processes that hold only a part of a step's
                tasks; None for T.
            replays: Replays long computations; None to use none.

        Returns:
            Gradients (named as in `state.params`), logs, statistics and buffers, averaged over
            tasks.

        Raises:
            RunFailed: Out of memory. The message names a chunk size that fits.
        """
        count = count or tasks.key.shape[0]

        def of_chunk(state: State, chunk: Task | Batch, progress: Tensor) -> Any:
            return self._chunk_step(state, chunk, progress, count)

        def with_chunk(size: int, few: Task | Batch = tasks) -> Step:
            parts = self._each(of_chunk, state, split(few, size), replays, progress)
            total = parts[0][0]
            for part, _ in parts[1:]:
                total = pytree.tree_map(torch.add, total, part)
            gradients = {name: value.contiguous() for name, value in total[0].items()}
            values: dict[str, Any] = {
                name: torch.cat([own[name] for _, own in parts]) for name in parts[0][1]
            }
            return Step(gradients, *total[1:], **values)

        with memory.suggest_chunk(with_chunk, tasks, self.chunk):
            return with_chunk(self.chunk)

    def _each(
        self,
        function: Callable[..., Any],
        state: State,
        chunks: list[Any],
        replays: replay.Replays | None,
        *rest: Tensor,
    ) -> list[Any]:
        """Return `function(state, chunk, *rest)` of each chunk.

        Own operators leave the use of several cores to us, but those of a single task use them.
        """
        if not (self.is_direct or self.is_pooled) or chunks[0].key.device.type != "cpu":
            return [function(state, chunk, *rest) for chunk in chunks]
        is_alone = self.strategy == "loop" and len(chunks) == 1
        compute = threads.alone if is_alone else threads.in_order
        if replays is not None:
            return replays(function, state, chunks, *rest, compute=compute)
        return compute(lambda chunk: function(state, chunk, *rest), chunks)

    def _chunk_step(
        self, state: State, chunk: Task | Batch, progress: Tensor, count: int
    ) -> tuple[tuple[Params, ...], dict[str, Tensor]]:
        """Return the fields of `Step` for some tasks: sums divided by `count`, and values."""
        state = self._with_layout(state)
        params = {name: value.detach().requires_grad_() for name, value in state.params.items()}
        with self.autocast(chunk.key.device):
            losses = self._losses(State(params, state.buffers), chunk, progress)
        is_mixed = self.precision == "mixed"
        products = precision.Bfloat16Products() if is_mixed else contextlib.nullcontext()
        with replay.FastSums(), products:
            gradients = torch.autograd.grad(
                losses.value.sum() / count, list(params.values()), materialize_grads=True
            )
        each = {"losses": losses.logs["loss"].detach()}
        if CLASS_ERRORS in losses.logs:
            each["class_errors"] = losses.logs.pop(CLASS_ERRORS)
        part = (
            dict(zip(params, gradients, strict=True)),
            *(
                _sum_over_tasks(part, count)
                for part in (losses.logs, losses.statistics, losses.buffers)
            ),
        )
        return part, each

    def _with_layout(self, state: State) -> State:
        """Return a state whose filters have the memory layout of the operators in use."""
        if not self.is_direct:
            return state
        params = {
            name: kernels.weight_layout(value) if value.dim() == 4 else value
            for name, value in state.params.items()
        }
        return State(params, state.buffers)

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Return the context of `precision` for computations on a device."""
        if self.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(device.type, torch.bfloat16)

    def _with_kernels(self, batched: bool) -> Algorithm:
        """Return the algorithm with kernels for `vmap` (batched) or for one task at a time."""
        convolution = self.convolution if batched and self.convolution != "auto" else "plain"
        own = kernels if convolution == "direct" else None
        pooled = kernels.pooled_block if self.is_pooled else None
        kinds = Kernels(convolution, fused_norm=not batched, own=own, pooled=pooled)
        backbone = dataclasses.replace(self.algorithm.backbone, kernels=kinds)
        return dataclasses.replace(self.algorithm, backbone=backbone)

    def _losses(self, state: State, tasks: Task | Batch, progress: Tensor) -> Loss:
        """Compute the losses of T tasks, each field with a leading T."""
        algorithm = self._with_kernels(batched=self.strategy == "vmap")
        loss: Any = algorithm.batch_loss if isinstance(tasks, Batch) else algorithm.loss
        if self.strategy == "vmap":
            return Loss(*vmap(loss, in_dims=(None, 0, None))(state, tasks, progress))
        if self.strategy == "loop" or isinstance(tasks, Batch):
            state = channels_last(state)
            return stack([loss(state, task, progress) for task in unbind(tasks)])
        each = self._adapted(state, tasks, algorithm.training_steps)
        return stack([algorithm.query_loss(state, *one) for one in each])

    def _adapted(
        self, state: State, tasks: Task, steps: int | None
    ) -> Iterator[tuple[Any, Query, Tensor]]:
        """Adapt to T tasks in one batch; return learner, queries and key of each."""
        algorithm = self._with_kernels(batched=True)

        def adapt(task: Task) -> Any:
            return algorithm.adapt(state, task.support, key=task.key, steps=steps)

        learners = unbind(vmap(adapt)(tasks))
        return zip(learners, unbind(tasks.query), tasks.key.unbind(), strict=True)

    def predictions(
        self,
        state: State,
        tasks: Task,
        steps: int | None = None,
        replays: replay.Replays | None = None,
    ) -> Tensor:
        """Adapt to the support sets of T tasks and predict their queries.

        Args:
            state: Parameters and buffers.
            tasks: Tasks with a leading T.
            steps: Number of adaptation steps; None for the number used in tests.
            replays: Replays long computations of this engine, with these `steps`; None to use none.

        Returns:
            Predictions [T, Q, N].

        Raises:
            RunFailed: Out of memory. The message names a chunk size that fits.
        """

        def predict(algorithm: Algorithm, learner: Any, query: Query, key: Tensor) -> Tensor:
            return algorithm.predict(state, learner, query.x)

        return self._outputs(predict, state, tasks, steps, replays)

    def scores(
        self,
        state: State,
        tasks: Task,
        steps: int | None = None,
        replays: replay.Replays | None = None,
    ) -> Tensor:
        """Score each of T tasks with the family's metric: [T]. Arguments as in `predictions`."""

        def score(algorithm: Algorithm, learner: Any, query: Query, key: Tensor) -> Tensor:
            return algorithm.score(state, learner, query, key)

        return self._outputs(score, state, tasks, steps, replays)

    def _outputs(
        self,
        output: Callable[..., Tensor],
        state: State,
        tasks: Task,
        steps: int | None,
        replays: replay.Replays | None,
    ) -> Tensor:
        """Adapt to T tasks and stack `output(algorithm, learner, query, key)` of each."""
        algorithm = self._with_kernels(batched=self.strategy == "vmap")

        @torch.no_grad()  # also in threads
        def of_chunk(state: State, chunk: Task) -> Tensor:
            state = self._with_layout(state)

            def adapt_and_output(task: Task) -> Tensor:
                learner = algorithm.adapt(state, task.support, key=task.key, steps=steps)
                return output(algorithm, learner, task.query, task.key)

            with self.autocast(chunk.key.device):
                if self.strategy == "vmap":
                    outputs = vmap(adapt_and_output)(chunk)
                elif self.strategy == "loop":
                    outputs = torch.stack([adapt_and_output(task) for task in unbind(chunk)])
                else:
                    each = self._adapted(state, chunk, steps)
                    outputs = torch.stack([output(algorithm, *one) for one in each])
            return outputs.float() if outputs.dtype == torch.bfloat16 else outputs

        def with_chunk(size: int, few: Task = tasks) -> Tensor:
            return torch.cat(self._each(of_chunk, state, split(few, size), replays))

        with memory.suggest_chunk(with_chunk, tasks, self.chunk):
            return with_chunk(self.chunk)


def _sum_over_tasks(values: Params, count: int) -> Params:
    """Sum over tasks in at least float32 and divide by `count`."""
    return {
        name: value.detach().to(torch.promote_types(value.dtype, torch.float32)).sum(0) / count
        for name, value in values.items()
    }
