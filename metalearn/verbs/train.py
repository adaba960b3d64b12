"""`metalearn train`: one run from data to result, and one table over the runs of a multirun."""

import json
import shlex
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from metalearn import loop, report
from metalearn.build import build
from metalearn.config import checked
from metalearn.errors import UserError
from metalearn.measure import measure
from metalearn.tracking import Tracker

CONFIG_FILE = "config.yaml"
RESULT_FILE = "result.json"
ENGINE_FILE = "engine.json"
#: What a run of a multirun leaves besides: its overrides, one a line, and why it failed.
OVERRIDES_FILE = "overrides.txt"
ERROR_FILE = "error.txt"


def train(config: DictConfig, folder: Path, name: str, overrides: list[str], console: Console) -> float:
    """One run, from data to `result.json` in `folder`. Returns: the best validation score.

    Of several processes (torchrun) this is the leading one's part; the others `follow`.
    Args: name, overrides: what the result says of itself, beside its figures.
    Raises: UserError before anything is written; RunFailed later.
    """
    start = time.perf_counter()
    settings = checked(config)
    run = build(settings)
    environment = report.environment(str(run.device))  # now, since a checkout may change while the run goes on
    if (folder / CONFIG_FILE).exists():
        raise UserError(f"{folder} holds a run already; choose another hydra.run.dir, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(OmegaConf.to_yaml(config, resolve=True))
    report.write_json(folder / ENGINE_FILE, run.choices)
    tracker = Tracker(settings, run.score, folder, console)
    failed = True
    try:
        console.print(
            f"{name}: {settings.train.steps} steps of {settings.train.meta_batch} tasks on {run.device}, "
            f"engine {run.train_engine.strategy}, statistics {settings.statistics}", highlight=False
        )  # fmt: skip
        with tracker.training():
            fitted = loop.fit(run, tracker, folder)
        result, _ = measure(run, fitted.state, folder / "test_")
        result |= {
            "name": name,
            "command": shlex.join(["metalearn", "train", *overrides]),
            "environment": environment,
            "val": {run.score.name: report.as_dict(fitted.best_val)},
            "best_step": fitted.best_step,
            "steps": fitted.steps,
            "seed": settings.seed,
            "engine": run.choices,
            "processes": run.processes.size,
            "seconds": time.perf_counter() - start,
        }
        table = report.result_table([report.result_row(name, result)])
        report.write_json(folder / RESULT_FILE, result)
        tracker.finish(result, table)
        failed = False
    finally:
        tracker.close(failed)
    console.print(table)
    report.print_details(console, result)
    for file in (
        RESULT_FILE,
        "metrics.jsonl",
        "test_scores.csv",
        *(["test_classes.csv"] if (folder / "test_classes.csv").exists() else []),
        "learning_curve.png",
        "checkpoints/best.pt",
        CONFIG_FILE,
        ENGINE_FILE,
        *(["profile/summary.md"] if (folder / "profile/summary.md").exists() else []),
    ):
        report.print_line(console, f"  {folder / file}")
    return fitted.best_val.mean


def follow(config: DictConfig) -> None:
    """The part of a process that does not lead: its share of the tasks and of the test episodes; writes nothing."""
    run = build(checked(config))
    assert not run.processes.leading
    loop.test(run, loop.fit(run, loop.Silent(), Path()).state, None)


def summarise(sweep: Path, console: Console) -> int:
    """One table over the runs of a multirun, the failed ones named. Returns: how many failed."""
    rows, failures = [], []
    folders = sorted((path for path in sweep.iterdir() if (path / OVERRIDES_FILE).exists()), key=_job_number)
    overrides = {folder: (folder / OVERRIDES_FILE).read_text().splitlines() for folder in folders}
    common = set.intersection(*(set(words) for words in overrides.values())) if len(folders) > 1 else set()
    for folder in folders:
        name = f"{folder.name}: {' '.join(word for word in overrides[folder] if word not in common)}"
        if (folder / ERROR_FILE).exists():
            failures.append(f"{name} failed: {(folder / ERROR_FILE).read_text().strip()}")
        elif (folder / RESULT_FILE).exists():
            rows.append(report.result_row(name, json.loads((folder / RESULT_FILE).read_text())))
    for score in dict.fromkeys(key for row in rows for key in row if key.startswith("test ")):
        console.print(report.result_table([row for row in rows if score in row]))
    if len({row["protocol"] for row in rows}) > 1:
        console.print("Figures with different protocols are different measurements.", highlight=False)
    for line in failures:
        console.print(f"[red]{line}[/red]", highlight=False, soft_wrap=True)
    report.print_line(console, f"  {sweep}")
    return len(failures)


def _job_number(folder: Path) -> tuple[int, str]:
    return (int(folder.name) if folder.name.isdigit() else 1 << 30, folder.name)
