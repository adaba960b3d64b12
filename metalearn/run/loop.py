"""Meta-train, meta-validate, meta-test: once, for every method and every data set."""

import dataclasses
import signal
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from metalearn.engine.capture import Captured
from metalearn.engine.profile import Profile
from metalearn.report.stats import estimate
from metalearn.run import checkpoint, nonfinite, optimisers
from metalearn.run.build import EVALUATION_BATCH, Run
from metalearn.run.step import Training
from metalearn.system import signals
from metalearn.system.errors import RunFailed
from metalearn.tasks.sampling import TaskSource
from metalearn.tasks.types import Estimate, State


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


def fit(run: Run, tracker: Tracker, folder: Path, kept: dict[str, Any] | None = None) -> Fitted:
    """Meta-trains, validates every `val.every` steps, keeps `checkpoints/best.pt`, `last.pt` and `previous.pt` under `folder`.

    With `train.steps=0` the initialisation is validated and kept. Of several processes only the leading one writes.
    Args: kept: a checkpoint to go on from, of the leading process.
    Raises: RunFailed when a loss or a validation is not finite; Stopped, once all is saved, on a signal.
    """
    settings, val, checkpoints = run.config.train, run.val, folder / "checkpoints"
    assert val is not None
    training = Training(run)
    kept = run.processes.from_leader(kept)
    if kept is not None:
        training.restore(kept)
    take_step = Captured(
        training.meta_step, lambda: training.engine, run.device, _why_no_graph(run), tracker.note
    )
    profile = None
    if run.config.engine.profile and run.processes.leading:
        header = f"{type(run.algorithm).__name__}, {settings.meta_batch} tasks a step on {run.device}, {run.choices}"
        profile = Profile(folder, run.device, settings.steps, settings.meta_batch, header)

    def save_last() -> None:
        if settings.nonfinite == "stop":
            nonfinite.judge_steps(run, training.meter, folder, tracker.note)
        if run.processes.leading:
            checkpoint.save(
                checkpoints / checkpoint.LAST, training.kept(), checkpoints / checkpoint.PREVIOUS
            )

    def save_best() -> None:
        if run.processes.leading:
            checkpoint.save(checkpoints / checkpoint.BEST, training.kept_best())

    def validate() -> dict[str, float]:
        scores = evaluate(run, training.state, val, run.config.val.episodes)
        nonfinite.judge_scores(run, scores, training.step)
        estimate_now = estimate(scores)
        if training.validated(estimate_now):
            save_best()
        return {
            f"val.{run.metric.name}": estimate_now.mean,
            f"val.{run.metric.name}_ci95": estimate_now.ci95,
        }

    def stop_if_asked(last: bool = False) -> None:
        # Several processes must stop at the same step, and agree on it when they wait for each other anyway.
        if run.processes.size > 1 and training.step % settings.log_every and not last:
            return
        if run.processes.any(signals.asked() is not None):
            save_last()
            raise signals.Stopped(
                signals.asked() or signal.SIGTERM, f"stopped at step {training.step}, saved"
            )

    if kept is not None and training.best is not None:
        save_best()  # what is there may be of a later step, or damaged
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
                nonfinite.judge_steps(run, training.meter, folder, tracker.note)
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
    """One score an episode [E], float32 on the host; fetched once."""
    parts = {
        part: run.test_engine.scores(state, source.draw(*part))
        for part in _own_parts(run, episodes)
    }
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
        answers = (run.test_engine.predictions if run.family.predicts else run.test_engine.scores)(
            state, tasks, steps
        )
        if not answers.isfinite().all():
            raise RunFailed(
                f"predictions of test episodes {part[0]} to {sum(part) - 1} are not finite; lower the inner rate"
            )
        prediction, y = answers, tasks.query.y
        found = {"scores": run.metric.of(prediction, y) if run.family.predicts else answers}
        classes = run.test.classes(*part)
        if classes is not None:
            confidence, chosen = prediction.softmax(-1).max(-1)
            found |= {
                "classes": classes.gather(1, y),
                "correct": chosen == y,
                "confidence": confidence,
            }
        for name, value in found.items():
            columns.setdefault(name, {})[part] = value
    return Tested(
        **{name: _gathered(run, parts, episodes).cpu() for name, parts in columns.items()}
    )


def _own_parts(run: Run, episodes: int) -> list[tuple[int, int]]:
    """(first, count) of the episodes in flight together, as far as they are this process's share."""
    first, count = run.processes.share(episodes)
    return [
        (at, min(EVALUATION_BATCH, first + count - at))
        for at in range(first, first + count, EVALUATION_BATCH)
    ]


def _gathered(run: Run, parts: dict[tuple[int, int], Tensor], episodes: int) -> Tensor:
    """What all processes found, in the order of the episodes: [E, …]."""
    found = torch.cat(list(parts.values()))
    if run.processes.size == 1:
        return found
    wide = found.double()  # any whole number here fits
    return run.processes.summed(run.processes.placed(wide, episodes)).to(found.dtype)


def _why_no_graph(run: Run) -> str | None:
    """Why a meta-step is not to be captured as a CUDA graph, or None."""
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
