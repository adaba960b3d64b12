"""Train one run in its folder, from data to result.json, or resume it."""

import contextlib
import dataclasses
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from metalearn.config import checking, composition
from metalearn.config.checking import check_config
from metalearn.report import tables
from metalearn.report.console import print_line, print_lines
from metalearn.report.environment import describe_environment
from metalearn.report.folder import RunFolder
from metalearn.report.plots import draw_learning_curve
from metalearn.report.progress import SILENT
from metalearn.report.result import Result
from metalearn.report.tracker import Tracker
from metalearn.run import checkpoint, loop, scoring
from metalearn.run.build import Run, build
from metalearn.run.evaluate import evaluate_several
from metalearn.run.inspection import examples
from metalearn.run.measure import measure, result_of
from metalearn.run.other_data import check_start, check_targets
from metalearn.run.pairings import without_effect
from metalearn.run.resuming import (
    check_choices,
    config_to_resume,
    save_command,
    with_stored_choices,
)
from metalearn.system.atomic import atomic_writer, remove_abandoned, write_json
from metalearn.system.errors import RunFailed, UserError, describe_os_error
from metalearn.system.lock import alone_in
from metalearn.system.signals import Stopped


def train(
    config: DictConfig,
    folder: Path,
    name: str,
    overrides: list[str],
    console: Console,
    recipe: str = "",
    title: str = "",
    is_tested: bool = True,
) -> float:
    """Train one run, write its results to a folder, and return its best validation score.

    With `resume=auto`, an interrupted run in the folder is resumed and a finished one is shown
    again. With several processes (torchrun), the leading process calls this and the others
    `follow`. A run that is not tested has validation.json, not result.json; resuming it tests it.

    `name` is that of the run in tables; the `overrides` of the command are saved with the result;
    `recipe` is a line about the recipe in use. A run of a sweep is introduced by a line, `title`,
    and its result is shown in one line.

    Raises:
        UserError: Before anything is written.
        RunFailed: If the run cannot continue.
        Stopped: On a signal, after everything is saved.
    """
    settings, files = check_config(config), RunFolder(folder)
    before = config_to_resume(files, settings)
    if before is not None and (files.is_finished or (files.is_trained and not is_tested)):
        return _show_again(files, console, title)
    if title:
        print_line(console, title)
    chunk = settings.engine.task_chunk  # in the command
    if before is not None:
        settings = with_stored_choices(settings, files, before)
    start = time.perf_counter()
    run = build(settings, is_restored=before is not None and files.last.exists())
    if before is None:
        check_start(run)  # later, the first run may be gone
    if is_tested:
        check_targets(run, config, settings.test_dataset)
    # Now, because the checkout may change during the run.
    environment = describe_environment(str(run.device))
    folder.mkdir(parents=True, exist_ok=True)
    with _explain_interruptions(folder), alone_in(folder):
        remove_abandoned(folder)
        if before is None and files.is_started:
            raise UserError(
                f"{folder}: another process has started a run here; choose another hydra.run.dir"
            )
        command, stored = save_command(files, name, overrides), None
        if before is not None:
            stored = checkpoint.latest(files, lambda line: print_line(console, line))
            check_choices(files, run.choices)
        if before is None or before.engine.task_chunk != chunk:
            write_json(files.engine, run.choices)
            kept = OmegaConf.create(checking.plain(settings)) if before is None else before
            kept.engine.task_chunk = chunk
            with atomic_writer(files.config) as stream:  # last: it marks the run as started
                stream.write(OmegaConf.to_yaml(kept).encode())
        step = stored["step"] if stored else -1
        lines = _first_lines(run, name, recipe, is_tested)
        lines += [f"resuming from step {step} of {folder}"] if stored else []
        tracker = Tracker(settings, run.metric, files, console, command["id"], step, lines)
        has_failed = True
        try:
            with tracker.live():
                fitted = loop.fit(run, tracker, folder, stored)
                draw_learning_curve(tracker.rows, run.metric.name, files.curve, name)
                training = {
                    "command": shlex.join(["metalearn", "train", *overrides]),
                    "val": {run.metric.name: dataclasses.asdict(fitted.best_val)},
                    "best_step": fitted.best_step,
                    "steps": fitted.steps,
                    "engine": run.choices,
                    "processes": run.processes.size,
                    **({"notes": list(run.notes)} if run.notes else {}),
                }

                def complete(result: Result) -> Result:
                    result.seconds = time.perf_counter() - start + tracker.seconds_before
                    result.training = training
                    return result

                files.config.stat()  # fails if the folder was removed, and perhaps made again
                result = complete(result_of(run, fitted.best_val, name, environment))
                result.write(files.validation)  # even if the test fails, the run is trained
                if is_tested:
                    own = (run, fitted.state, name, environment, folder / "test_")
                    with _explain_failed_test(folder):
                        result = complete(measure(*own, listener=tracker)[0])
            if is_tested:
                table = tables.result_table([tables.result_row(name, result)])
                tracker.finish(result, table, lambda: examples(run, fitted.state))
                files.config.stat()
                result.write(files.result)  # last: it marks the run as finished
                files.validation.unlink(missing_ok=True)
            files.error.unlink(missing_ok=True)
            has_failed = False
        finally:
            tracker.close(has_failed)
    if title:
        print_line(console, f"{title.partition(':')[0]}: {tables.result_line(result)}")
    else:
        _show(files, result, console)
    if is_tested and settings.test_dataset:
        _test_others(folder, settings.test_dataset, console)
    return fitted.best_val.mean


def _test_others(folder: Path, words: list[str], console: Console) -> None:
    """Test a finished run on other datasets; raise RunFailed if that fails for one."""
    try:
        failures = evaluate_several([folder], words, [], "test", console)["failures"]
    except UserError as error:
        failures = [{"reason": str(error)}]
    if failures:
        raise RunFailed(
            f"{failures[0]['reason']}; the run is finished, to test it again: metalearn evaluate "
            f"{folder} dataset={','.join(words)}"
        )


def _first_lines(run: Run, name: str, recipe: str, is_tested: bool) -> list[str]:
    """Return what the run will do; the first line is about the amount of work."""
    settings = run.config
    validations = max(1, -(-settings.train.steps // settings.val.every))
    test = f"a test of {settings.test.episodes:,}" if is_tested else "no test"
    lines = [
        f"{name} on {run.device}: {_count(settings.train.steps, 'step')} of "
        f"{_count(settings.train.meta_batch, 'task')}, {_count(validations, 'validation')} of "
        f"{_count(settings.val.episodes, 'episode')}, {test}",
        f"{recipe}{'; ' if recipe else ''}engine {run.train_engine.strategy}, statistics "
        f"{settings.statistics}",
    ]
    if settings.episode.unlabelled and not run.algorithm.uses_unlabelled:
        method = type(run.algorithm).__name__
        lines.append(f"{method} does not use the unlabelled examples of its episodes")
    return [*lines, *without_effect(settings), *run.notes]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def resume(folder: Path, console: Console) -> None:
    """Resume the interrupted run in a folder, or show a finished one; raise UserError for none."""
    files = RunFolder(folder)
    if not files.command.exists():
        several = any(folder.glob(f"*/{files.command.name}"))
        raise UserError(
            f"{folder}: this is a multirun folder; repeat its command with hydra.sweep.dir={folder}"
            if several
            else f"{folder}: no run to resume; name the folder of a training run"
        )
    command = files.read_command()
    folder = folder.absolute()
    # The directory may be gone, or on another machine.
    with contextlib.suppress(OSError, ValueError):
        os.chdir(command.get("directory", "."))  # relative paths of the configuration start there
    config: Any = OmegaConf.merge(composition.load_config(folder), {"resume": "auto"})
    train(config, folder, command["name"], command["overrides"], console)


@contextlib.contextmanager
def _explain_failed_test(folder: Path) -> Iterator[None]:
    """Add to the failure of a test what can be done with a trained run."""
    try:
        yield
    except RunFailed as failed:
        raise RunFailed(
            f"{failed}; the run is trained: metalearn evaluate {folder} can change how it adapts"
        ) from None


@contextlib.contextmanager
def _explain_interruptions(folder: Path) -> Iterator[None]:
    """Add to an interruption or a system error how to resume."""
    try:
        yield
    except Stopped as stopped:
        raise Stopped(stopped.number, f"{stopped}; to resume: metalearn resume {folder}") from None
    except OSError as error:
        if error.errno is None:
            raise
        if not folder.exists():
            raise RunFailed(f"{folder} was removed while the run was writing to it") from None
        raise RunFailed(
            f"{describe_os_error(error)}; earlier checkpoints are intact; fix the problem, then "
            f"run: metalearn resume {folder}"
        ) from None


def _show_again(files: RunFolder, console: Console, title: str) -> float:
    """Show a finished run, in one line if it has a title. Return its validation score."""
    result = files.read_result()
    if title:
        print_line(console, f"{title}: finished, {tables.result_line(result)}")
    else:
        print_line(console, f"{files.path} holds this run, finished:")
        _show(files, result, console)
    return result.validation_score


def _show(files: RunFolder, result: Result, console: Console) -> None:
    console.print(tables.result_table([tables.result_row(result.name, result)]))
    tables.print_details(console, result)
    print_lines(console, files.outputs(), "  ")


def follow(config: DictConfig, folder: Path) -> None:
    """Compute a non-leading process's share of the tasks and test episodes; write nothing."""
    settings, files = check_config(config), RunFolder(folder)
    if settings.resume == "auto" and files.is_finished:
        return
    if settings.resume == "auto" and files.is_started:
        settings = with_stored_choices(settings, files, composition.load_config(folder))
    run = build(settings, is_restored=files.last.exists())
    assert not run.processes.is_leader
    scoring.test(run, loop.fit(run, SILENT, Path()).state, None)
