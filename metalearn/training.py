"""A run while it is meta-trained: all that changes, one meta-step, and how it is kept and found again."""

import dataclasses
import hashlib
import math
import time
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils import _pytree as pytree

from metalearn.build import Run
from metalearn.errors import UserError
from metalearn.types import Estimate, Params, State


@dataclasses.dataclass
class Best:
    """The best state by validation, its score, and how long ago it was: `since` validations."""

    estimate: Estimate
    step: int
    state: State
    since: int = 0


class Training:
    """The state of a run, the optimiser's, what has been seen since the last row of figures, and the best so far.

    step: meta-steps taken; engine: what takes the next one, another object where the method enters another stage. The tensors are
    the same throughout, changed in place: a CUDA graph reads and writes them where they lie.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._settings = run, run.config.train
        self.state = State(run.state.meta, {name: value.clone() for name, value in run.state.fixed.items()})
        self._leaves = list(self.state.meta.values())
        self._optimiser, self._schedule = _optimiser(self._settings, self._leaves)
        self._own_first, self._own_count = run.processes.share(self._settings.meta_batch)
        self._classes = hashlib.sha256(repr(run.class_names).encode()).hexdigest()  # which are in which split
        self._steps_done = torch.zeros((), dtype=torch.int64, device=run.device)
        self.step = 0
        self.engine = run.train_engine
        self._enter_stage()
        self.best: Best | None = None
        self.meter = Meter(run.device)

    def meta_step(self) -> None:
        """One step on the device, without a look at any value. A step whose loss or gradient is not finite changes nothing but
        what the optimiser does with a gradient of zero.
        """
        run, settings, fixed = self._run, self._settings, self.state.fixed
        progress = self._steps_done.to(torch.float32) / settings.steps
        with record_function("draw tasks"):
            tasks = run.train.draw(self._steps_done * settings.meta_batch + self._own_first, self._own_count)
        with record_function("gradients"):
            step = self.engine.step(self.state, tasks, progress, settings.meta_batch)
            losses = run.processes.placed(step.losses, settings.meta_batch)
            gradients, logs, statistics, losses = run.processes.summed((*step[:3], losses))
        with record_function("optimiser"):
            finite = torch.stack(
                [value.isfinite().all() for value in pytree.tree_leaves((gradients, logs, statistics))]
            ).all()
            for leaf, gradient in zip(self._leaves, _clipped(gradients, settings), strict=True):
                leaf.grad = torch.where(finite, gradient, torch.zeros_like(gradient))
            self._optimiser.step()
            seen = {name: torch.where(finite, value, fixed[name]) for name, value in statistics.items()}
            fold(fixed, seen, settings.statistics_momentum)
            self.meter.add(logs, finite, self._steps_done, losses)
            self._steps_done.add_(1)

    def count(self) -> None:
        """The host's part of a meta-step."""
        self.step += 1
        self._schedule.step()
        self.meter.count(self._settings.meta_batch)
        self._enter_stage()

    def _enter_stage(self) -> None:
        engine = self._run.train_engine.at(self.step / max(1, self._settings.steps))
        if engine != self.engine:
            self.engine = engine

    def validated(self, estimate: Estimate) -> bool:
        """Takes note of a validation. Returns: whether it is the best so far."""
        if self.best is not None and not self._run.score.better(estimate.mean, self.best.estimate.mean):
            self.best.since += 1
            return False
        state = State(*({name: value.detach().clone() for name, value in part.items()} for part in self.state))
        self.best = Best(estimate, self.step, state)
        return True

    def kept(self) -> dict[str, Any]:
        """All of it, as tensors and plain data."""
        return {
            **self._weights(self.step, self.state),
            "optimiser": self._optimiser.state_dict(),
            "schedule": {"last_epoch": self._schedule.last_epoch},
            "meter": self.meter.kept(),
            "best": self.kept_best() | {"since": self.best.since} if self.best else None,
            "classes": self._classes,
        }

    def kept_best(self) -> dict[str, Any]:
        """The best state, as tensors and plain data."""
        assert self.best is not None
        return self._weights(self.best.step, self.best.state) | {"val": dataclasses.asdict(self.best.estimate)}

    def _weights(self, step: int, state: State) -> dict[str, Any]:
        return {
            "step": step,
            "meta": state.meta,
            "fixed": state.fixed,
            "spec": dataclasses.asdict(self._run.spec),
            "standardisation": self._run.standardisation,
            "content_hash": self._run.content_hash,
        }

    def restore(self, kept: dict[str, Any]) -> None:
        """Becomes what `kept` gave, wherever its tensors lie. Raises: UserError where that is of other data or another version."""
        device = self._run.device
        try:
            if (kept["content_hash"], kept["classes"]) != (self._run.content_hash, self._classes):
                raise UserError(
                    "the data, or their split, are others than when the run was stopped; bring those back, or begin another run"
                )
            for part, found in zip(self.state, (kept["meta"], kept["fixed"]), strict=True):
                if {name: value.shape for name, value in part.items()} != {n: v.shape for n, v in found.items()}:
                    raise UserError("the checkpoint's weights are not those of this configuration")
                for name, value in part.items():
                    value.copy_(found[name])
            own: list[dict[str, Any]] = [
                {name: group[name] for name in ("lr", "capturable", "fused") if name in group}
                for group in self._optimiser.param_groups
            ]
            self._optimiser.load_state_dict(kept["optimiser"])
            for group, usual, found in zip(
                self._optimiser.param_groups, own, kept["optimiser"]["param_groups"], strict=True
            ):
                group.update(usual)  # a rate on the device stays the tensor that it is
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(float(found["lr"]))
                else:
                    group["lr"] = float(found["lr"])
            self._schedule.last_epoch = kept["schedule"]["last_epoch"]
            self.meter.restore(kept["meter"])
            best = kept["best"]
            if best is not None:
                state = State(
                    *({name: value.to(device) for name, value in best[part].items()} for part in ("meta", "fixed"))
                )
                self.best = Best(Estimate(**best["val"]), best["step"], state, best["since"])
            self.step = kept["step"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the checkpoint cannot be gone on from ({error}); it was made by another version"
            ) from None
        self._steps_done.fill_(self.step)
        self._enter_stage()


class Meter:
    """Means since the last reading, summed on the device and fetched when read; tasks a second; the first step since then
    whose loss or gradient was not finite.

    steps: taken since the last reading.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums: Params = {}
        self.steps = self._tasks = 0
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._first_skipped = torch.full((2,), -1, dtype=torch.int64, device=device)  # step and task, from 0
        self.restart_clock()

    def add(self, logs: Params, finite: Tensor, step: Tensor, losses: Tensor) -> None:
        """What a step says, into the sums where they lie.

        Args: finite: [] bool; step: [] its number from 0; losses: of its tasks, [T].
        """
        for name, value in logs.items():
            counted = torch.where(finite, value, torch.zeros_like(value))
            if name in self._sums:
                self._sums[name].add_(counted)
            else:
                self._sums[name] = counted.clone()
        bad = ~losses.isfinite()
        task = torch.where(bad.any(), bad.to(torch.int64).argmax(), -1)
        new = ~finite & (self._skipped == 0)
        self._first_skipped.copy_(torch.where(new, torch.stack([step, task]), self._first_skipped))
        self._skipped.add_((~finite).to(torch.int64))
        self._in_a_row.copy_(torch.where(finite, 0, self._in_a_row + 1))

    def count(self, tasks: int) -> None:
        """A step with so many tasks is done."""
        self.steps += 1
        self._tasks += tasks

    def restart_clock(self) -> None:
        self._clock = time.perf_counter()

    def skipped(self) -> tuple[int, int, int | None]:
        """How many steps were not finite, the first of them, and its first task whose loss was not (from 0)."""
        step, task = self._first_skipped.tolist()
        return int(self._skipped), step, task if task >= 0 else None

    def in_a_row(self) -> int:
        """How many steps up to now were not finite, one after the other."""
        return int(self._in_a_row)

    def read(self) -> dict[str, float]:
        """The figures of a row; then all begins anew."""
        skipped = int(self._skipped)
        counted = self.steps - skipped
        row = {f"train.{name}": value.item() / counted for name, value in self._sums.items()} if counted else {}
        if skipped:
            row["train.skipped"] = skipped
        for value in (*self._sums.values(), self._skipped):
            value.zero_()
        now = time.perf_counter()
        row["tasks_per_second"] = self._tasks / (now - self._clock)
        self._clock, self.steps, self._tasks = now, 0, 0
        return row

    def kept(self) -> dict[str, Any]:
        return {
            "sums": self._sums,
            "steps": self.steps,
            "skipped": self._skipped,
            "first_skipped": self._first_skipped,
            "in_a_row": self._in_a_row,
        }

    def restore(self, kept: dict[str, Any]) -> None:
        self._sums = {name: value.to(self._skipped.device) for name, value in kept["sums"].items()}
        self.steps = kept["steps"]
        self._skipped.copy_(kept["skipped"])
        self._first_skipped.copy_(kept["first_skipped"])
        self._in_a_row.copy_(kept["in_a_row"])


def _optimiser(settings: Any, leaves: list[Tensor]) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    lr: Any = settings.lr
    capturable = leaves[0].device.type == "cuda"
    if capturable:  # a CUDA graph reads the rate from the device
        lr = torch.tensor(lr, device=leaves[0].device)
    optimiser: torch.optim.Optimizer
    if settings.optimiser == "adam":
        optimiser = torch.optim.Adam(leaves, lr=lr, capturable=capturable)
    else:
        # torch's other implementations fetch a rate that lies on the device.
        optimiser = torch.optim.SGD(leaves, lr=lr, fused=capturable)
    factors = {
        "constant": lambda step: 1.0,
        "linear": lambda step: 1 - step / max(1, settings.steps),
        "cosine": lambda step: (1 + math.cos(math.pi * step / max(1, settings.steps))) / 2,
        "step": lambda step: settings.schedule_factor ** (step // settings.schedule_every),
    }
    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, factors[settings.schedule])


def _clipped(gradients: Params, settings: Any) -> list[Tensor]:
    values = list(gradients.values())
    if settings.clip_value is not None:
        values = [value.clamp(-settings.clip_value, settings.clip_value) for value in values]
    if settings.clip_norm is not None:
        norm = torch.stack([value.square().sum() for value in values]).sum().sqrt()
        scale = (settings.clip_norm / (norm + 1e-12)).clamp_max(1)
        values = [value * scale for value in values]
    return values


def fold(fixed: Params, seen: Params, momentum: float) -> None:
    """Moves `fixed`, in place, by a share of the way to the statistics of a step: an exponential moving average."""
    for name, value in seen.items():
        fixed[name].lerp_(value.to(fixed[name].dtype), momentum)
