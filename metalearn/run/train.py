"""`metalearn train`: one run from data to result, and one table over the runs of a multirun."""

import contextlib
import dataclasses
import json
import os
import shlex
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from metalearn.config import checking, composition, roles
from metalearn.config.checking import checked, leaves
from metalearn.config.schema import COMPONENTS, RunConfig
from metalearn.report import tables
from metalearn.report.console import print_line
from metalearn.report.environment import describe_environment
from metalearn.report.tracker import Tracker
from metalearn.run import checkpoint, loop
from metalearn.run.build import FREE_CHOICES, build
from metalearn.run.measure import measure
from metalearn.system.atomic import remove_abandoned, replacing, write_json
from metalearn.system.errors import RunFailed, UserError, of_system
from metalearn.system.lock import alone_in
from metalearn.system.signals import Stopped

CONFIG_FILE = "config.yaml"
RESULT_FILE = "result.json"
ENGINE_FILE = "engine.json"
#: What was asked for: the run's name, its overrides, and its identifier at W&B.
COMMAND_FILE = "command.json"
#: Why a run of a multirun failed.
ERROR_FILE = "error.txt"


def train(
    config: DictConfig,
    folder: Path,
    name: str,
    overrides: list[str],
    console: Console,
    recipe: str = "",
) -> float:
    """One run, from data to `result.json` in `folder`; with `resume=auto`, what lies there is gone on with, and what is finished
    is shown again. Returns: the best validation score.

    Of several processes (torchrun) this is the leading one's part; the others `follow`.
    Args: name, overrides: what the result says of itself, beside its figures; recipe: a line on where its settings come from.
    Raises: UserError before anything is written; RunFailed later; Stopped on a signal, once all is saved.
    """
    settings = checked(config)
    earlier = _earlier(folder, config, settings)
    if earlier and (folder / RESULT_FILE).exists():
        return _shown_again(folder, name, console)
    if earlier:
        settings = _as_before(settings, folder)
    start = time.perf_counter()
    run = build(settings, is_restored=earlier is not None and _has_weights(folder))
    environment = describe_environment(
        str(run.device)
    )  # now, since a checkout may change while the run goes on
    folder.mkdir(parents=True, exist_ok=True)
    with _explained(folder), alone_in(folder):
        remove_abandoned(folder)
        if earlier is None and (folder / CONFIG_FILE).exists():
            raise UserError(
                f"{folder}: another process has begun a run there; choose another hydra.run.dir"
            )
        kept = checkpoint.latest(folder / "checkpoints", _teller(console)) if earlier else None
        command = note_command(folder, name, overrides)
        if earlier is None:
            write_json(folder / ENGINE_FILE, run.choices)
            with replacing(folder / CONFIG_FILE) as stream:  # last, for it says that there is a run
                stream.write(OmegaConf.to_yaml(OmegaConf.create(checking.plain(settings))).encode())
        else:
            _check_place(folder, run.choices)
            _note_chunk(folder, settings, run.choices)
        tracker = Tracker(
            settings, run.metric, folder, console, command["id"], kept["step"] if kept else -1
        )
        failed = True
        try:
            if recipe:
                print_line(console, recipe)
            console.print(
                f"{name}: {settings.train.steps} steps of {settings.train.meta_batch} tasks on {run.device}, "
                f"engine {run.train_engine.strategy}, statistics {settings.statistics}", highlight=False
            )  # fmt: skip
            if kept:
                print_line(console, f"going on from step {kept['step']} of {folder}")
            with tracker.training():
                fitted = loop.fit(run, tracker, folder, kept)
            result, _ = measure(run, fitted.state, folder / "test_")
            result |= {
                "name": name,
                "command": shlex.join(["metalearn", "train", *overrides]),
                "environment": environment,
                "val": {run.metric.name: tables.as_dict(fitted.best_val)},
                "best_step": fitted.best_step,
                "steps": fitted.steps,
                "seed": settings.seed,
                "engine": run.choices,
                "processes": run.processes.size,
                "seconds": time.perf_counter() - start + tracker.seconds_before,
            }
            table = tables.result_table([tables.result_row(name, result)])
            tracker.finish(result, table)
            write_json(folder / RESULT_FILE, result)  # last, for it says that the run is finished
            (folder / ERROR_FILE).unlink(missing_ok=True)  # an earlier attempt's
            failed = False
        finally:
            tracker.close(failed)
    _show(folder, result, table, console)
    return fitted.best_val.mean


def _earlier(folder: Path, config: DictConfig, settings: RunConfig) -> Path | None:
    """The folder, if a run of this configuration lies there that is to be gone on with.

    Raises: UserError where one lies there that is not to be, or not with this configuration.
    """
    if not (folder / CONFIG_FILE).exists():
        return None
    finished = (folder / RESULT_FILE).exists()
    if settings.resume != "auto":
        does = "shows it again" if finished else "goes on with it"
        raise UserError(f"{folder} holds a {'finished' if finished else 'stopped'} run; resume=auto {does}, another hydra.run.dir "
                        "keeps it")  # fmt: skip
    current = checking.plain(settings)
    before, now = (
        dict(_leaves(node)) for node in (composition.stored(folder), OmegaConf.create(current))
    )
    described = roles.roles(current)
    for key in sorted(
        {**before, **now}, key=lambda key: key.partition(".")[0] not in COMPONENTS
    ):  # what explains most
        if before.get(key) != now.get(key) and not roles.may_resume_with(key, described):
            raise UserError(
                f"{folder} holds a run with {key}={before.get(key)}, not {now.get(key)}; go on with it as it was "
                f"(metalearn resume {folder}), or choose another hydra.run.dir"
            )
    return folder


def _leaves(node: DictConfig) -> Iterator[tuple[str, Any]]:
    resolved: Any = OmegaConf.create(OmegaConf.to_container(node, resolve=True))
    for key in leaves(resolved):
        yield key, OmegaConf.select(resolved, key)


def _as_before(settings: RunConfig, folder: Path) -> RunConfig:
    """Settings that repeat what the run's engine chose before it stopped, unless another chunk is asked for now; weights from a
    file are in the checkpoint.
    """
    path, engine = folder / ENGINE_FILE, settings.engine
    if path.exists() and composition.stored(folder).engine.task_chunk == engine.task_chunk:
        engine = dataclasses.replace(engine, **FREE_CHOICES, choices=str(path))
    return dataclasses.replace(settings, engine=engine)


def _has_weights(folder: Path) -> bool:
    """Return True if a checkpoint of the run exists, so that files of pretrained weights are not needed."""
    return (folder / "checkpoints" / checkpoint.LAST).exists()


def _check_place(folder: Path, choices: dict[str, Any]) -> None:
    """Raises: UserError where a run goes on on another device, or in another number of processes, than it began."""
    before = json.loads((folder / ENGINE_FILE).read_text())
    for name in ("device", "processes"):
        if name in before and before[name] != choices[name]:
            raise UserError(
                f"{folder}: this run has {name}={before[name]}, here it is {choices[name]}; go on with it as it was"
            )


def _note_chunk(folder: Path, settings: RunConfig, choices: dict[str, Any]) -> None:
    """Writes down that a run goes on with another number of tasks in flight than it was begun with, for good."""
    stored = composition.stored(folder)
    if stored.engine.task_chunk == settings.engine.task_chunk:
        return
    stored.engine.task_chunk = settings.engine.task_chunk
    write_json(folder / ENGINE_FILE, choices)
    with replacing(folder / CONFIG_FILE) as stream:
        stream.write(OmegaConf.to_yaml(stored).encode())


def note_command(folder: Path, name: str, overrides: list[str]) -> dict[str, Any]:
    """Writes down what was asked for, and where, unless a run has begun of it. Returns: what the file holds."""
    path = folder / COMMAND_FILE
    found: dict[str, Any] = (
        json.loads(path.read_text()) if path.exists() else {"id": uuid.uuid4().hex[:8]}
    )
    if "name" not in found or not (folder / CONFIG_FILE).exists():
        found |= {"name": name, "overrides": overrides, "directory": str(Path.cwd())}
        write_json(path, found)
    return found


def resume(folder: Path, console: Console) -> None:
    """Goes on with the stopped run in a folder, or shows the finished one again. Raises: UserError where there is none."""
    try:
        command = json.loads((folder / COMMAND_FILE).read_text())
        name, overrides = command["name"], command["overrides"]
    except (OSError, ValueError, KeyError, TypeError):
        several = any(folder.glob(f"*/{COMMAND_FILE}"))
        way_out = (
            "give its command again with resume=auto"
            if several
            else "name the folder of a training run"
        )
        raise UserError(
            f"{folder}: no run to go on with lies there{' but a multirun' if several else ''}; {way_out}"
        ) from None
    folder = folder.absolute()
    with contextlib.suppress(OSError):  # it is no longer there, or on another machine
        os.chdir(command.get("directory", "."))  # relative paths in the configuration start there
    config: Any = OmegaConf.merge(composition.stored(folder), {"resume": "auto"})
    train(config, folder, name, overrides, console)


def _teller(console: Console) -> Callable[[str], None]:
    return lambda line: print_line(console, line)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """What ends a run in the middle, in a line that says how to go on."""
    try:
        yield
    except Stopped as stopped:
        raise Stopped(stopped.number, f"{stopped}; metalearn resume {folder} goes on") from None
    except OSError as error:
        if error.errno is None:
            raise
        raise RunFailed(
            f"{of_system(error)}; what was saved before is whole: mend that, then metalearn resume {folder}"
        ) from None


def _shown_again(folder: Path, name: str, console: Console) -> float:
    """The result of a finished run. Returns: its validation score."""
    result = json.loads((folder / RESULT_FILE).read_text())
    print_line(console, f"{folder} holds this run, finished:")
    _show(folder, result, tables.result_table([tables.result_row(name, result)]), console)
    return float(next(iter(result["val"].values()))["mean"])


def _show(folder: Path, result: dict[str, Any], table: Table, console: Console) -> None:
    console.print(table)
    tables.print_details(console, result)
    for file in (
        RESULT_FILE,
        "metrics.jsonl",
        "test_scores.csv",
        "test_classes.csv",
        "learning_curve.png",
        "checkpoints/best.pt",
        CONFIG_FILE,
        ENGINE_FILE,
        "profile/summary.md",
    ):
        if (folder / file).exists():
            print_line(console, f"  {folder / file}")


def follow(config: DictConfig, folder: Path) -> None:
    """The part of a process that does not lead: its share of the tasks and of the test episodes; writes nothing."""
    settings = checked(config)
    if settings.resume == "auto" and (folder / CONFIG_FILE).exists():
        settings = _as_before(settings, folder)
    run = build(settings, is_restored=_has_weights(folder))
    assert not run.processes.leading
    loop.test(run, loop.fit(run, loop.Silent(), Path()).state, None)


def summarise(sweep: Path, console: Console) -> int:
    """One table over the runs of a multirun, the failed ones named. Returns: how many failed."""
    rows, failures = [], []
    begun = [
        path for path in sweep.iterdir() if path.name.isdigit() or (path / COMMAND_FILE).exists()
    ]
    folders = sorted(begun, key=_job_number)
    overrides = {folder: _overrides(folder) for folder in folders}
    common = (
        set.intersection(*(set(words) for words in overrides.values()))
        if len(folders) > 1
        else set()
    )
    for folder in folders:
        name = (
            f"{folder.name}: {' '.join(word for word in overrides[folder] if word not in common)}"
        )
        if (folder / ERROR_FILE).exists():
            failures.append(f"{name} failed: {(folder / ERROR_FILE).read_text().strip()}")
        elif not (folder / RESULT_FILE).exists():
            failures.append(f"{name} has not finished")
        if (folder / RESULT_FILE).exists():
            rows.append(tables.result_row(name, json.loads((folder / RESULT_FILE).read_text())))
    for score in dict.fromkeys(key for row in rows for key in row if key.startswith("test ")):
        console.print(tables.result_table([row for row in rows if score in row]))
    if len({row["protocol"] for row in rows}) > 1:
        console.print(
            "Figures with different protocols are different measurements.", highlight=False
        )
    for line in failures:
        console.print(f"[red]{line}[/red]", highlight=False, soft_wrap=True)
    print_line(console, f"  {sweep}")
    return len(failures)


def _overrides(folder: Path) -> list[str]:
    """What a run of a multirun was asked for; nothing where not even that could be written."""
    path = folder / COMMAND_FILE
    return list(json.loads(path.read_text())["overrides"]) if path.exists() else []


def _job_number(folder: Path) -> tuple[int, str]:
    return (int(folder.name) if folder.name.isdigit() else 1 << 30, folder.name)
