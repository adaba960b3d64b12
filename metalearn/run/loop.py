"""Meta-train, meta-validate and meta-test: one loop for every method and dataset."""

import dataclasses
import signal
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from metalearn.engine.capture import Captured
from metalearn.engine.profile import Profile
from metalearn.report.folder import RunFolder
from metalearn.report.stats import estimate
from metalearn.run import checkpoint, nonfinite, optimisers
from metalearn.run.build import Run
from metalearn.run.step import Training
from metalearn.system import signals
from metalearn.system.atomic import make_folder
from metalearn.system.errors import RunFailed
from metalearn.tasks.sampling import TaskSource
from metalearn.tasks.types import Estimate, State


class Tracker(Protocol):
    """Receives the progress of the loop."""

    def log(self, row: dict[str, Any]) -> None:
        """Log a row: `step` and its metrics."""

    def note(self, line: str) -> None:
        """Tell the user something once."""


class Silent:
    """A tracker that discards everything."""

    def log(self, row: dict[str, Any]) -> None:
        """Discard the row."""

    def note(self, line: str) -> None:
        """Discard the line."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The best state by validation, its validation score, and the number of steps."""

    state: State
    best_val: Estimate
    best_step: int
    steps: int


def fit(run: Run, tracker: Tracker, folder: Path, stored: dict[str, Any] | None = None) -> Fitted:
    """Meta-train, validate every `val.every` steps, and save checkpoints.

    With `train.steps=0` the initialisation is validated and saved. With several processes, only
    the leading one writes.

    Args:
        run: The run.
        tracker: Receives the progress.
        folder: The run folder.
        stored: A checkpoint to resume from, in the leading process.

    Returns:
        The best state by validation.

    Raises:
        RunFailed: If a loss or a validation score is not finite.
        Stopped: On a signal, after everything is saved.
    """
    settings, val, files = run.config.train, run.val, RunFolder(folder)
    assert val is not None
    training = Training(run)
    stored = run.processes.from_leader(stored)
    if stored is not None:
        training.load_state_dict(stored)
    take_step = Captured(
        training.meta_step, lambda: training.engine, run.device, _why_no_graph(run), tracker.note
    )
    profile = None
    if run.config.engine.profile and run.processes.is_leader:
        make_folder(files.profile)
        for file in files.profile.iterdir():
            if file.is_symlink():  # the profiler would write through it
                file.unlink()
        header = (
            f"{type(run.algorithm).__name__}, {settings.meta_batch} tasks per step on "
            f"{run.device}, {run.choices}"
        )
        profile = Profile(folder, run.device, settings.steps, settings.meta_batch, header)

    def save_last() -> None:
        if settings.nonfinite == "stop":
            nonfinite.check_steps(run, training.meter, folder, tracker.note)
        if run.processes.is_leader:
            checkpoint.save(files.last, training.state_dict(), files.previous)

    def save_best() -> None:
        if run.processes.is_leader:
            checkpoint.save(files.best, training.best_state_dict())

    def validate() -> dict[str, float]:
        scores = evaluate(run, training.state, val, run.config.val.episodes)
        nonfinite.check_scores(run, scores, training.step)
        estimate_now = estimate(scores)
        if training.record_validation(estimate_now):
            save_best()
        return {
            f"val.{run.metric.name}": estimate_now.mean,
            f"val.{run.metric.name}_ci95": estimate_now.ci95,
        }

    def stop_if_asked(last: bool = False) -> None:
        # Several processes must stop at the same step; they agree when they synchronise anyway.
        if run.processes.size > 1 and training.step % settings.log_every and not last:
            return
        if run.processes.any(signals.received_signal() is not None):
            save_last()
            raise signals.Stopped(
                signals.received_signal() or signal.SIGTERM,
                f"stopped at step {training.step}, saved",
            )

    if stored is not None and training.best is not None:
        save_best()  # the file may be of a later step, or corrupt
    with signals.deferred():
        if settings.steps == 0 and training.best is None:
            tracker.log({"step": 0, **validate()})
        while training.step < settings.steps and not _patience_is_over(training, settings):
            if profile:
                profile.before(training.step)
            take_step()
            if profile:
                profile.after(training.step)
            training.count()
            step = training.step
            validating = step == settings.steps or step % run.config.val.every == 0
            if validating or step % settings.log_every == 0:
                nonfinite.check_steps(run, training.meter, folder, tracker.note)
                row = {"step": step, **training.meter.read()}
                if validating:
                    row |= validate()
                    training.meter.restart_clock()
                tracker.log(row)
            if step % run.config.checkpoint.every == 0:
                save_last()
            stop_if_asked()
        save_last()
        stop_if_asked(last=True)
    assert training.best is not None
    best = training.best
    return Fitted(best.state, best.estimate, best.step, training.step)


def _patience_is_over(training: Training, settings: Any) -> bool:
    return bool(settings.patience and training.best and training.best.since >= settings.patience)


def evaluate(run: Run, state: State, source: TaskSource, episodes: int) -> Tensor:
    """Return one score per episode, float32 [E] on the host."""
    parts = {
        part: run.test_engine.scores(state, source.draw(*part))
        for part in _own_parts(run, episodes)
    }
    return _gathered(run, parts, episodes).cpu()


@dataclasses.dataclass(frozen=True)
class Tested:
    """Outcome of the test episodes, on the host.

    Attributes:
        scores: Score of each episode, float32 [E].
        classes: Class of each query in the split, int64 [E, Q]; None for regression.
        correct: Whether each query was classified correctly, bool [E, Q]; None for regression.
        confidence: Probability of the predicted class, float32 [E, Q]; None for regression.
    """

    scores: Tensor
    classes: Tensor | None = None
    correct: Tensor | None = None
    confidence: Tensor | None = None


def test(run: Run, state: State, steps: int | None) -> Tested:
    """Test on the fixed test episodes. steps: adaptation steps; None: as in the settings."""
    episodes = run.config.test.episodes
    columns: dict[str, dict[tuple[int, int], Tensor]] = {}
    for part in _own_parts(run, episodes):
        tasks = run.test.draw(*part)
        answers = (run.test_engine.predictions if run.family.predicts else run.test_engine.scores)(
            state, tasks, steps
        )
        if not answers.isfinite().all():
            raise RunFailed(
                f"predictions of test episodes {part[0]} to {sum(part) - 1} are not finite; "
                "lower the inner learning rate"
            )
        prediction, y = answers, tasks.query.y
        outcome = {"scores": run.metric.of(prediction, y) if run.family.predicts else answers}
        classes = run.test.classes(*part)
        if classes is not None:
            confidence, chosen = prediction.softmax(-1).max(-1)
            outcome |= {
                "classes": classes.gather(1, y),
                "correct": chosen == y,
                "confidence": confidence,
            }
        for name, value in outcome.items():
            columns.setdefault(name, {})[part] = value
    return Tested(
        **{name: _gathered(run, parts, episodes).cpu() for name, parts in columns.items()}
    )


def _own_parts(run: Run, episodes: int) -> list[tuple[int, int]]:
    """Return (first, count) of each chunk of this process's share of the episodes."""
    first, count = run.processes.share(episodes)
    batch = run.config.engine.evaluation_batch
    return [(at, min(batch, first + count - at)) for at in range(first, first + count, batch)]


def _gathered(run: Run, parts: dict[tuple[int, int], Tensor], episodes: int) -> Tensor:
    """Return the values of all processes in the order of the episodes, [E, …]."""
    values = torch.cat(list(parts.values()))
    if run.processes.size == 1:
        return values
    wide = values.double()  # exact for every integer here
    return run.processes.all_reduce_sum(run.processes.scatter(wide, episodes)).to(values.dtype)


def _why_no_graph(run: Run) -> str | None:
    """Return why a meta-step is not captured as a CUDA graph, or None."""
    if not run.config.engine.cuda_graph:
        return "engine.cuda_graph=false"
    if run.processes.size > 1:
        return "several processes exchange gradients within a step"
    name = run.config.optimiser["_target_"].rpartition(".")[2]
    return (
        None
        if optimisers.can_be_captured(getattr(torch.optim, name))
        else f"{name} cannot be captured"
    )
