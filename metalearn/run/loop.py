"""Meta-train and meta-validate: one loop for every method and dataset."""

import contextlib
import dataclasses
import signal
import time
from pathlib import Path
from typing import Any

from metalearn.engine.capture import Captured, synchronise
from metalearn.engine.profile import Profile
from metalearn.engine.replay import Replays
from metalearn.report.folder import RunFolder
from metalearn.report.progress import Listener, Probe
from metalearn.report.stats import estimate
from metalearn.run import checkpoint, features, nonfinite
from metalearn.run.build import Run
from metalearn.run.scoring import evaluate
from metalearn.run.step import Training
from metalearn.system import signals
from metalearn.system.atomic import make_folder
from metalearn.tasks.types import Estimate, State


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The best state by validation, its validation score, and the number of steps."""

    state: State
    best_val: Estimate
    best_step: int
    steps: int


def fit(run: Run, tracker: Listener, folder: Path, stored: dict[str, Any] | None = None) -> Fitted:
    """Meta-train, validate every `val.every` steps, and save checkpoints.

    With `train.steps=0` the initialisation is validated and saved. With several processes, only
    the leading one writes, and has the checkpoint `stored` to resume from.

    Raises:
        RunFailed: If a validation score is not finite, or a loss or gradient is not finite and
            `train.nonfinite=stop` (with `skip`: after many such steps in a row).
        Stopped: On a signal, after everything is saved. A validation is stopped at once, and
            repeated when the run is resumed.
    """
    settings, val, files = run.config.train, run.val, RunFolder(folder)
    assert val is not None
    training = Training(run)
    training.note = tracker.note
    stored = run.processes.from_leader(stored)
    if stored is not None:
        training.load_state_dict(stored)
    if settings.steps:
        run = features.for_training(run, training.state, tracker)
        training.use(run)
    take_step = Captured(
        training.meta_step,
        lambda: training.engine,
        run.device,
        run.reason_not_captured,
        tracker.note,
    )
    replays = Replays(tracker.note)
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

    def seconds_per_episode() -> float:
        for count in (1, 4):  # the first call is slower than the others
            start = time.perf_counter()
            run.test_engine.scores(training.tested_state, val.draw(0, count)).cpu()
        return (time.perf_counter() - start) / count

    def save_last() -> None:
        if settings.nonfinite == "stop":
            nonfinite.check_steps(run, training.meter, folder, tracker.note)
        if run.processes.is_leader:
            checkpoint.save(files.last, training.state_dict(), files.previous)
            remove_surpassed()

    def remove_surpassed() -> None:
        # Not before last.pt is saved: a run that is resumed from it needs them again.
        for file in files.all_kept():
            if file not in map(files.kept, training.kept):
                file.unlink()

    def save_best() -> None:
        if run.processes.is_leader:
            checkpoint.save(files.best, training.best_state_dict())

    def validate() -> dict[str, float]:
        try:
            # Several processes would wait for each other's scores.
            at_once = run.processes.size == 1
            with signals.raised_at_once() if at_once else contextlib.nullcontext():
                scores = evaluate(
                    *(run, training.tested_state, val, run.config.val.episodes, tracker), replays
                )
        except signals.Stopped as stopped:
            save_last()
            raise signals.Stopped(
                stopped.number, f"stopped in the validation of step {training.step}, saved"
            ) from None
        nonfinite.check_scores(run, scores, training.step)
        estimate_now = estimate(scores)
        if training.record_validation(estimate_now):
            save_best()
        if training.step in training.kept and run.processes.is_leader:
            checkpoint.save(
                files.kept(training.step),
                training.tested_state_dict(training.step, training.tested_state, estimate_now),
            )
        return {
            f"val.{run.metric.name}": estimate_now.mean,
            f"val.{run.metric.name}_ci95": estimate_now.ci95,
        }

    def is_validated(step: int) -> bool:
        return step == settings.steps or step % run.config.val.every == 0

    def log_row() -> None:
        """Complete the row of this step by a validation if one is due, and log it."""
        assert training.row is not None
        row = training.row
        if is_validated(row["step"]):
            row = row | validate()
            training.meter.restart_clock()
        training.row = None
        tracker.log(row)

    def stop_if_asked(last: bool = False) -> None:
        # Several processes must stop at the same step, and agree on it only where they wait for
        # each other anyway.
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
        if run.processes.is_leader:
            remove_surpassed()
    with signals.deferred():
        tracker.begin(
            Probe(training.meter.peek, lambda: synchronise(run.device), seconds_per_episode)
        )
        if settings.steps == 0 and training.best is None:
            training.row = {"step": 0}
        if training.row is not None:
            log_row()
        while training.step < settings.steps and not training.patience_is_over:
            if profile:
                profile.before(training.step)
            training.load_tasks()
            take_step()
            if profile:
                profile.after(training.step)
            training.count()
            step = training.step
            tracker.step(step)
            if is_validated(step) or step % settings.log_every == 0:
                nonfinite.check_steps(run, training.meter, folder, tracker.note)
                training.row = {"step": step, **training.meter.read()}
                if training.meter.notice:
                    tracker.note(training.meter.notice)
                log_row()
            if step % run.config.checkpoint.every == 0:
                save_last()
            stop_if_asked()
        save_last()
        stop_if_asked(last=True)
    assert training.best is not None
    best = training.best
    return Fitted(best.state, best.estimate, best.step, training.step)
