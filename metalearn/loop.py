"""Meta-train, meta-validate, meta-test: once, for every method and every data set."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from metalearn import checkpoint
from metalearn.build import EVALUATION_BATCH, Run
from metalearn.engine.capture import Captured
from metalearn.engine.profile import Profile
from metalearn.episodes import TaskSource
from metalearn.errors import RunFailed
from metalearn.stats import estimate
from metalearn.types import Estimate, Params, State


class Tracker(Protocol):
    """What the loop tells about its progress."""

    def log(self, row: dict[str, Any]) -> None:
        """One row: `step` and what is known at it."""

    def note(self, line: str) -> None:
        """What the user should know once."""


class Silent:
    """A tracker that tells nobody."""

    def log(self, row: dict[str, Any]) -> None:
        pass

    def note(self, line: str) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The best state by validation, its validation score, and the steps taken."""

    state: State
    best_val: Estimate
    best_step: int
    steps: int


def fit(run: Run, tracker: Tracker, folder: Path) -> Fitted:
    """Meta-trains, validates every `val.every` steps, keeps `checkpoints/best.pt` and `last.pt` under `folder`.

    With `train.steps=0` the initialisation is validated and kept. Of several processes only the leading one writes.
    Raises: RunFailed when the loss is no longer finite.
    """
    settings, score, val = run.config.train, run.score, run.val
    assert val is not None
    # The same tensors throughout, changed in place: a CUDA graph reads and writes them where they lie.
    state = State(run.state.meta, {name: value.clone() for name, value in run.state.fixed.items()})
    leaves = list(state.meta.values())
    optimiser, schedule = _optimiser(settings, leaves)
    best: Estimate | None = None
    best_step = validations_since_best = step = 0
    meter = _Meter()

    own_first, own_count = run.processes.share(settings.meta_batch)
    best_state = state
    steps_done = torch.zeros((), dtype=torch.int64, device=run.device)

    def meta_step() -> None:
        progress = steps_done.to(torch.float32) / settings.steps
        with record_function("draw tasks"):
            tasks = run.train.draw(steps_done * settings.meta_batch + own_first, own_count)
        with record_function("gradients"):
            result = run.processes.summed(run.train_engine.step(state, tasks, progress, settings.meta_batch))
        with record_function("optimiser"):
            for leaf, gradient in zip(leaves, _clipped(result.gradients, settings), strict=True):
                leaf.grad = gradient
            optimiser.step()
            fold(state.fixed, result.statistics, settings.statistics_momentum)
            meter.add(result.logs)
            steps_done.add_(1)

    take_step = Captured(meta_step, run.device, _why_no_graph(run), tracker.note)
    profile = None
    if run.config.engine.profile and run.processes.leading:
        header = f"{type(run.algorithm).__name__}, {settings.meta_batch} tasks a step on {run.device}, {run.choices}"
        profile = Profile(folder, run.device, settings.steps, settings.meta_batch, header)

    def save(name: str) -> None:
        if not run.processes.leading:
            return
        content = {
            "step": step,
            "meta": state.meta,
            "fixed": state.fixed,
            "spec": dataclasses.asdict(run.spec),
            "standardisation": run.standardisation,
            "optimiser": optimiser.state_dict(),
            "schedule": {"last_epoch": schedule.last_epoch},
            "best": {"step": best_step, "mean": best.mean if best else None},
        }
        checkpoint.save(folder / "checkpoints" / name, content)

    def validate() -> dict[str, float]:
        nonlocal best, best_state, best_step, validations_since_best
        estimate_now = estimate(evaluate(run, state, val, run.config.val.episodes))
        if not math.isfinite(estimate_now.mean):
            raise RunFailed(f"val.{score.name} is {estimate_now.mean} at step {step}; lower train.lr or the inner rate")
        validations_since_best += 1
        if score.better(estimate_now.mean, best.mean if best else None):
            best, best_step, validations_since_best = estimate_now, step, 0
            best_state = State(*({name: value.detach().clone() for name, value in part.items()} for part in state))
            save("best.pt")
        return {f"val.{score.name}": estimate_now.mean, f"val.{score.name}_ci95": estimate_now.ci95}

    if settings.steps == 0:
        tracker.log({"step": 0, **validate()})
    for step in range(1, settings.steps + 1):
        if profile:
            profile.before(step - 1)
        take_step()
        if profile:
            profile.after(step - 1)
        schedule.step()
        meter.count(settings.meta_batch)

        last = step == settings.steps
        validating = last or step % run.config.val.every == 0
        if validating or step % settings.log_every == 0:
            row = {"step": step, **meter.read()}
            if not math.isfinite(row["train.loss"]):
                raise RunFailed(f"train.loss is {row['train.loss']} at step {step}; lower train.lr or the inner rate")
            if validating:
                row |= validate()
                meter.restart_clock()
            tracker.log(row)
            stopping = settings.patience and validations_since_best >= settings.patience
            if stopping:
                break
        if step % run.config.checkpoint.every == 0:
            save("last.pt")
    save("last.pt")
    assert best is not None
    return Fitted(best_state, best, best_step, step)


def evaluate(run: Run, state: State, source: TaskSource, episodes: int) -> Tensor:
    """One score an episode [E], float32 on the host; fetched once."""
    parts = {part: run.test_engine.scores(state, source.draw(*part), run.score) for part in _own_parts(run, episodes)}
    return _gathered(run, parts, episodes).cpu()


@dataclasses.dataclass(frozen=True)
class Tested:
    """What the fixed list of test episodes gave, on the host.

    scores: float32 [E], one an episode; classes: int64 [E, Q], the class of the split each query belongs to;
    correct: bool [E, Q]; confidence: float32 [E, Q], the share of the predicted class. The last three are None for
    regression.
    """

    scores: Tensor
    classes: Tensor | None = None
    correct: Tensor | None = None
    confidence: Tensor | None = None


def test(run: Run, state: State, steps: int | None) -> Tested:
    """Tests on the fixed list of test episodes. steps: adaptation steps; None: as the method's settings say."""
    episodes = run.config.test.episodes
    columns: dict[str, dict[tuple[int, int], Tensor]] = {}
    for part in _own_parts(run, episodes):
        tasks = run.test.draw(*part)
        prediction, y = run.test_engine.predictions(state, tasks, steps), tasks.query.y
        if not prediction.isfinite().all():
            raise RunFailed(
                f"predictions of test episodes {part[0]} to {sum(part) - 1} are not finite; lower the inner rate"
            )
        found = {"scores": run.score.of(prediction, y)}
        classes = run.test.classes(*part)
        if classes is not None:
            confidence, chosen = prediction.softmax(-1).max(-1)
            found |= {"classes": classes.gather(1, y), "correct": chosen == y, "confidence": confidence}
        for name, value in found.items():
            columns.setdefault(name, {})[part] = value
    return Tested(**{name: _gathered(run, parts, episodes).cpu() for name, parts in columns.items()})


def _own_parts(run: Run, episodes: int) -> list[tuple[int, int]]:
    """(first, count) of the episodes in flight together, as far as they are this process's share."""
    first, count = run.processes.share(episodes)
    return [(at, min(EVALUATION_BATCH, first + count - at)) for at in range(first, first + count, EVALUATION_BATCH)]


def _gathered(run: Run, parts: dict[tuple[int, int], Tensor], episodes: int) -> Tensor:
    """What all processes found, in the order of the episodes: [E, …]."""
    found = torch.cat(list(parts.values()))
    if run.processes.size == 1:
        return found
    whole = found.new_zeros((episodes, *found.shape[1:]), dtype=torch.float64)  # wide enough for any whole number here
    first, count = run.processes.share(episodes)
    whole[first : first + count] = found
    return run.processes.summed(whole).to(found.dtype)


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


def _why_no_graph(run: Run) -> str | None:
    """Why a meta-step is not to be captured as a CUDA graph, or None."""
    if not run.config.engine.cuda_graph:
        return "engine.cuda_graph=false"
    return "several processes exchange gradients within a step" if run.processes.size > 1 else None


class _Meter:
    """Means since the last reading, summed on the device and fetched when read; tasks a second."""

    def __init__(self) -> None:
        self.sums: Params = {}
        self.steps = self.tasks = 0
        self.restart_clock()

    def add(self, logs: Params) -> None:
        """What a step says, into the sums where they lie."""
        for name, value in logs.items():
            if name in self.sums:
                self.sums[name].add_(value)
            else:
                self.sums[name] = value.clone()

    def count(self, tasks: int) -> None:
        """A step with so many tasks is done."""
        self.steps += 1
        self.tasks += tasks

    def restart_clock(self) -> None:
        self.clock = time.perf_counter()

    def read(self) -> dict[str, float]:
        row = {f"train.{name}": value.item() / self.steps for name, value in self.sums.items()}
        for value in self.sums.values():
            value.zero_()
        now = time.perf_counter()
        row["tasks_per_second"] = self.tasks / (now - self.clock)
        self.clock, self.steps, self.tasks = now, 0, 0
        return row
