"""Meta-train, meta-validate and meta-test: one loop for every method and dataset."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.engine import Engine
from metalearn.engine.capture import Captured
from metalearn.engine.profile import Profile
from metalearn.report.folder import RunFolder
from metalearn.report.progress import SILENT, Listener, Probe
from metalearn.report.stats import estimate
from metalearn.run import checkpoint, features, nonfinite
from metalearn.run.build import Run
from metalearn.run.step import Training
from metalearn.system import signals
from metalearn.system.atomic import make_folder
from metalearn.system.errors import RunFailed
from metalearn.tasks.ranges import Part, numbers_of, parts_of
from metalearn.tasks.sampling import TaskSource
from metalearn.tasks.types import Estimate, State, Task


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

    def wait() -> None:
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)

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
                scores = evaluate(run, training.tested_state, val, run.config.val.episodes, tracker)
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
        tracker.begin(Probe(training.meter.peek, wait, seconds_per_episode))
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
                log_row()
            if step % run.config.checkpoint.every == 0:
                save_last()
            stop_if_asked()
        save_last()
        stop_if_asked(last=True)
    assert training.best is not None
    best = training.best
    return Fitted(best.state, best.estimate, best.step, training.step)


def evaluate(
    run: Run,
    state: State,
    source: TaskSource,
    episodes: int,
    listener: Listener = SILENT,
) -> Tensor:
    """Return the score of each episode, float32 [E] on the host."""
    scores, numbers = [], []
    size = run.config.engine.evaluation_batch
    for part, engine, tasks in _drawn(run, state, source, episodes, size, "val", listener):
        scores.append(engine.scores(state, tasks))
        numbers.append(numbers_of(part))
    return _gathered(run, scores, numbers, episodes)


def _drawn(
    run: Run,
    state: State,
    source: TaskSource,
    episodes: int,
    size: int,
    phase: str,
    listener: Listener,
) -> Iterator[tuple[Part, Engine, Task]]:
    """Yield this process's share of the episodes in parts of `size`, each counted when done."""
    first, total = run.processes.share(episodes)
    parts = parts_of(source, first, total, size)
    engine, source = features.with_features(run, run.test_engine, source, state, parts, listener)
    listener.episodes(phase, 0, total)
    done = 0
    for part in parts:
        yield part, engine, source.draw(*part)
        done += part[1]
        listener.episodes(phase, done, total)


@dataclasses.dataclass(frozen=True)
class Tested:
    """Outcome of the test episodes, on the host; of regression, only the scores."""

    scores: Tensor  # of each episode, float32 [E]
    #: Index within the split of each query's class, int64 [E, Q]. An episode with fewer queries
    #: than others has -1 after its own.
    classes: Tensor | None = None
    predicted: Tensor | None = None  # the same of the class that was predicted
    correct: Tensor | None = None  # whether each query was classified correctly, bool [E, Q]
    confidence: Tensor | None = None  # probability of the predicted class, float32 [E, Q]


def test(
    run: Run,
    state: State,
    steps: int | None,
    listener: Listener = SILENT,  # noqa: PT028 (not a test of ours)
    others: Sequence[tuple[Run, State]] = (),  # noqa: PT028
) -> Tested:
    """Test on the fixed test episodes; raise RunFailed if a prediction is not finite.

    `steps` is the number of adaptation steps; None for the method's own. With `others`, runs with
    the same test episodes, the predictions of all are averaged, of classes their probabilities.
    """
    episodes, own = run.config.test.episodes, run.config.episode
    columns: dict[str, list[Tensor]] = {}
    numbers: list[Tensor] = []
    most = own.query * (own.way[-1] if isinstance(own.way, list) else own.way)
    size = run.config.engine.evaluation_batch
    members = [
        _drawn(one, own_state, one.test, episodes, size, "test", listener if one is run else SILENT)
        for one, own_state in ((run, state), *others)
    ]
    states = [state, *(own_state for _, own_state in others)]
    for drawn in zip(*members, strict=True):
        part, _, tasks = drawn[0]
        each = [
            (engine.predictions if run.family.predicts else engine.scores)(
                own_state, own_tasks, steps
            )
            for (_, engine, own_tasks), own_state in zip(drawn, states, strict=True)
        ]
        classes = run.test.classes(*part)
        answers = each[0] if len(each) == 1 else _averaged(each, classes is not None)
        if not answers.isfinite().all():
            among = numbers_of(part)
            raise RunFailed(
                f"outputs for test episodes {among[0]} to {among[-1]} are not finite; lower "
                "train.lr, or algo.inner_lr if the method has one"
            )
        prediction, y = answers, tasks.query.y
        outcome = {"scores": run.metric.of(prediction, y) if run.family.predicts else answers}
        if classes is not None:
            confidence, chosen = prediction.softmax(-1).max(-1)
            classes = classes.to(y.device)
            queries = {
                "classes": classes.gather(1, y),
                "predicted": classes.gather(1, chosen),
                "correct": chosen == y,
            }
            missing = (0, max(0, most - y.shape[1]))
            outcome |= {name: F.pad(value, missing, value=-1) for name, value in queries.items()}
            outcome["confidence"] = F.pad(confidence, missing)
        for name, value in outcome.items():
            columns.setdefault(name, []).append(value)
        numbers.append(numbers_of(part))
    return Tested(
        **{name: _gathered(run, parts, numbers, episodes) for name, parts in columns.items()}
    )


def _averaged(outputs: list[Tensor], is_class: bool) -> Tensor:
    """Return the mean of outputs [T, Q, N]; of logits, the logarithm of the mean probability."""
    stacked = torch.stack(outputs)
    if not is_class:
        return stacked.mean(0)
    return stacked.log_softmax(-1).logsumexp(0) - math.log(len(outputs))


def _gathered(run: Run, parts: list[Tensor], numbers: list[Tensor], episodes: int) -> Tensor:
    """Return the values of all processes in the order of the E episodes, [E, …], on the host.

    `parts` and `numbers` are the values and, int64 [T] on the CPU, the numbers of this process's.
    """
    values = torch.cat(parts)[torch.cat(numbers).argsort()]
    if run.processes.size > 1:
        wide = run.processes.scatter(values.double(), episodes)  # exact for every integer here
        values = run.processes.all_reduce_sum(wide).to(values.dtype)
    return values.cpu()
