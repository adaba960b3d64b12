"""The state of a run in meta-training: take one meta-step, save and restore."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils import _pytree as pytree

from metalearn.engine.replay import Replays
from metalearn.run import checkpoint, optimisers
from metalearn.run.build import Run
from metalearn.run.feed import Feed
from metalearn.run.meter import Meter
from metalearn.system.errors import UserError
from metalearn.tasks.sampling import TaskSource
from metalearn.tasks.types import Estimate, State

#: Version of the content of last.pt; earlier ones cannot be resumed.
FORMAT = 2


@dataclasses.dataclass
class Best:
    """The best state by validation."""

    estimate: Estimate
    step: int
    state: State
    since: int = 0  # number of validations since then


class Training:
    """Everything that changes in meta-training.

    All tensors are changed in place, because a CUDA graph reads and writes fixed addresses.

    Attributes:
        state: Parameters and buffers.
        optimiser: The meta-optimiser.
        step: Number of meta-steps taken.
        engine: The engine of the next step; a different object when the method enters a new stage.
        average: The moving average of the state with `train.ema`; else None.
        best: The best state by validation so far.
        kept: Step and score of the best `checkpoint.keep` validations; {} if only one is kept.
        meter: Metrics since the last row.
        row: The row of this step while its validation is under way; None otherwise.
        reads_host: Whether values may be read on the host, which is free on a CPU.
        note: Receives lines for the user.
        has_stepped: Whether the optimiser has taken a step, so that all of its state exists.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._settings = run, run.config.train
        self.note: Callable[[str], None] = lambda text: None
        self.state = State(
            run.state.params, {name: value.clone() for name, value in run.state.buffers.items()}
        )
        lr = optimisers.learning_rate(self._settings, 0)
        self.optimiser = optimisers.make(run.config.optimiser, lr, [*self.state.params.values()])
        self.average = None if self._settings.ema is None else _copied(self.state)
        self._own_first, self._own_count = run.processes.share(self._settings.meta_batch)
        self.reads_host = run.device.type == "cpu"
        self.has_stepped = False
        # Hash of the classes of each split.
        self._classes = hashlib.sha256(repr(run.class_names).encode()).hexdigest()
        self._steps_done = torch.zeros((), dtype=torch.int64, device=run.device)
        self.step = 0
        self.engine, self._replays = run.train_engine, Replays(lambda text: self.note(text))
        self.best: Best | None = None
        self.kept: dict[int, float] = {}
        self.meter = Meter(run.device)
        self.row: dict[str, Any] | None = None
        self.use(run)

    def use(self, run: Run) -> None:
        """Train with the tasks and the engine of another form of the same run."""
        self._run = run
        self._feed = Feed(run.train, self._own_count, run.device) if run.draws_on_host else None
        self._enter_stage()

    def load_tasks(self) -> None:
        """Provide the tasks of the next meta-step, if the host draws them."""
        if self._feed is not None:
            self._feed.load(self._first_task)

    @property
    def _first_task(self) -> int:
        return self.step * self._settings.meta_batch + self._own_first

    def meta_step(self) -> None:
        """Take one step on the device without reading a value on the host.

        A step with a non-finite loss or gradient changes no parameter, buffer or optimiser state.
        """
        run, settings, buffers = self._run, self._settings, self.state.buffers
        progress = self._steps_done.to(torch.float32) / settings.steps
        # Only on the host can the number of the step decide on shapes.
        done = self.step if run.shapes_vary else self._steps_done
        first = done * settings.meta_batch + self._own_first
        with record_function("draw tasks"):
            feed, count = self._feed, self._own_count
            tasks = run.train.draw(first, count) if feed is None else feed.tasks
        with record_function("gradients"):
            step = self.engine.step(self.state, tasks, progress, settings.meta_batch, self._replays)
            losses = run.processes.scatter(step.losses, settings.meta_batch)
            counts = self._class_counts(first, step.class_errors)
            gradients, logs, statistics, new_buffers, losses, counts = run.processes.all_reduce_sum(
                (*step[:4], losses, counts)
            )
        with record_function("optimiser"):
            values = pytree.tree_leaves((gradients, logs, statistics, new_buffers))
            finite = torch.stack([value.isfinite().all() for value in values]).all()
            is_frozen = run.algorithm.backbone.is_frozen
            clipped = optimisers.clip_gradients(gradients, settings)
            for (name, leaf), gradient in zip(self.state.params.items(), clipped, strict=True):
                # Without a gradient, weight decay does not change frozen weights.
                leaf.grad = None if is_frozen and name.startswith("net.") else gradient
            can_wait = self.reads_host or not self.has_stepped
            self.has_stepped |= optimisers.step_if(self.optimiser, finite, can_wait)
            for name, value in statistics.items():  # moving averages follow them
                value = torch.where(finite, value, buffers[name]).to(buffers[name].dtype)
                buffers[name].lerp_(value, settings.statistics_momentum)
            for name, value in new_buffers.items():
                value = torch.where(finite, value.to(buffers[name].dtype), buffers[name])
                buffers[name].copy_(value)
            if self.average is not None:
                self._follow(self.average, finite)
            if run.hard_classes is not None:
                wrong, asked = counts[0]
                run.hard_classes.record(wrong, asked, finite)
            self.meter.add(logs, finite, self._steps_done, losses)
            self._steps_done.add_(1)

    def _class_counts(self, first: int | Tensor, errors: Tensor | None) -> list[Tensor]:
        """Return the wrong predictions and the queries of each class [2, C]; [] if not needed."""
        run = self._run
        if run.hard_classes is None:
            return []
        if errors is None:
            name = type(run.algorithm).__name__
            raise UserError(
                f"episode.train.sampler=hard: the loss of {name} does not count the errors of "
                "classes; use another sampler"
            )
        classes = cast(TaskSource, run.train).classes(first, self._own_count)
        assert classes is not None
        counts = torch.zeros_like(run.hard_classes.errors).repeat(2, 1)
        # Whole numbers, so their sum does not depend on the order.
        return [counts.index_add(1, classes.flatten(), errors.transpose(0, 1).flatten(1))]

    def _follow(self, average: State, finite: Tensor) -> None:
        """Move the average towards the state if `finite`.

        As in TensorFlow, step n has a decay of at most (1 + n) / (10 + n), so that the average
        soon forgets the initial weights.
        """
        assert self._settings.ema is not None
        decay = ((1 + self._steps_done) / (10 + self._steps_done)).clamp_max(self._settings.ema)
        weight = torch.where(finite, 1 - decay, 0)
        for value, new in zip(*map(pytree.tree_leaves, (average, self.state)), strict=True):
            if value.is_floating_point():
                value.lerp_(new.detach(), weight.to(value.dtype))
            else:
                value.copy_(new)

    @property
    def tested_state(self) -> State:
        """The state to validate and test: with `train.ema` the average."""
        return self.state if self.average is None else self.average

    def count(self) -> None:
        """Do the host's part of a meta-step: count it, set the next learning rate, draw tasks."""
        self.step += 1
        if self._feed is not None and self.step < self._settings.steps:
            self._feed.prefetch(self._first_task)
        optimisers.set_learning_rate(self.optimiser, self._settings, self.step)
        self.meter.count(self._settings.meta_batch)
        self._enter_stage()

    def _enter_stage(self) -> None:
        engine = self._run.train_engine.at(self.step / max(1, self._settings.steps))
        if engine != self.engine:
            self.engine, self._replays = engine, Replays(lambda text: self.note(text))

    @property
    def patience_is_over(self) -> bool:
        """True after `train.patience` validations without a better one."""
        most = self._settings.patience
        return bool(most and self.best and self.best.since >= most)

    def record_validation(self, estimate: Estimate) -> bool:
        """Record a validation score. Return True if it is the best so far."""
        if (most := self._run.config.checkpoint.keep) > 1:
            scores = {**self.kept, self.step: estimate.mean}
            sign = -1 if self._run.metric.higher_is_better else 1
            order = sorted(scores, key=lambda step: (sign * scores[step], step))
            self.kept = {step: scores[step] for step in order[:most]}
        if self.best is not None and not self._run.metric.better(
            estimate.mean, self.best.estimate.mean
        ):
            self.best.since += 1
            return False
        self.best = Best(estimate, self.step, _copied(self.tested_state))
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as tensors and plain data."""
        hard = self._run.hard_classes
        return {
            **self._weights(self.step, self.state),
            "format": FORMAT,
            "optimiser": self.optimiser.state_dict()["state"],
            "meter": self.meter.state_dict(),
            "row": self.row,
            "best": self.best_state_dict() | {"since": self.best.since} if self.best else None,
            "classes": self._classes,
            **({"kept": self.kept} if self.kept else {}),
            **({"average": checkpoint.parts_of(self.average)} if self.average else {}),
            **({"class_errors": hard.errors} if hard else {}),
        }

    def best_state_dict(self) -> dict[str, Any]:
        """Return the best state, as tensors and plain data."""
        assert self.best is not None
        return self.tested_state_dict(self.best.step, self.best.state, self.best.estimate)

    def tested_state_dict(self, step: int, state: State, score: Estimate) -> dict[str, Any]:
        """Return a validated state, as tensors and plain data."""
        return self._weights(step, state) | {"val": dataclasses.asdict(score)}

    def _weights(self, step: int, state: State) -> dict[str, Any]:
        return {
            "step": step,
            **checkpoint.parts_of(state),
            "spec": dataclasses.asdict(self._run.spec),
            "standardisation": self._run.standardisation,
            "content_hash": self._run.data.content_hash,
        }

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Restore the training state from a checkpoint, on any device.

        Raise UserError if the data or the format differ.
        """
        if content.get("format") != FORMAT:
            raise UserError(
                "the checkpoint was made by another version of metalearn and cannot be resumed; "
                "train again in another hydra.run.dir"
            )
        try:
            data = content["content_hash"], content["classes"]
            if data != (self._run.data.content_hash, self._classes):
                raise UserError(
                    "the data or their split have changed since the run was stopped; restore "
                    "them, or start a new run"
                )
            average = [(content["average"], self.average)] if self.average else []
            for stored, state in [(content, self.state), *average]:
                for key, own in checkpoint.parts_of(state).items():
                    if checkpoint.shapes(own) != checkpoint.shapes(stored[key]):
                        raise UserError("the checkpoint's weights do not fit this configuration")
                    for name, value in own.items():
                        value.copy_(stored[key][name])
            if self._run.hard_classes is not None:
                self._run.hard_classes.errors.copy_(content["class_errors"])
            rates = [group["lr"] for group in self.optimiser.param_groups]
            own = self.optimiser.state_dict()["param_groups"]
            self.optimiser.load_state_dict({"state": content["optimiser"], "param_groups": own})
            for group, rate in zip(self.optimiser.param_groups, rates, strict=True):
                group["lr"] = rate  # a CUDA graph reads this tensor
            self.meter.load_state_dict(content["meter"])
            if (best := content["best"]) is not None:
                parts = best["meta"], best["fixed"]
                own = pytree.tree_map(lambda x: x.to(self._run.device), parts)
                self.best = Best(Estimate(**best["val"]), best["step"], State(*own), best["since"])
            self.kept = dict(content.get("kept", {}))
            self.step = content["step"]
            self.row = content.get("row")
            self.has_stepped = bool(content["optimiser"]) or self.step > 0
            optimisers.set_learning_rate(self.optimiser, self._settings, self.step)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"the checkpoint cannot be resumed ({error}); another version wrote it"
            ) from None
        self._steps_done.fill_(self.step)
        self._enter_stage()


def _copied(state: State) -> State:
    """Return a copy of a state, without gradients."""
    parts = ({name: value.detach().clone() for name, value in part.items()} for part in state)
    return State(*parts)
