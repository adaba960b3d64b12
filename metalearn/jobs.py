"""What the verbs do once a configuration is checked: one training run, one evaluation, one table over a multirun."""

import json
import shlex
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from metalearn import checkpoint, loop, report
from metalearn.build import Run, build
from metalearn.config import RunConfig, checked
from metalearn.errors import UserError
from metalearn.stats import estimate
from metalearn.tracking import Tracker
from metalearn.types import State

CONFIG_FILE = "config.yaml"
RESULT_FILE = "result.json"
#: What a run of a multirun leaves besides: its overrides, one a line, and why it failed.
OVERRIDES_FILE = "overrides.txt"
ERROR_FILE = "error.txt"


def train(config: DictConfig, folder: Path, name: str, overrides: list[str], console: Console) -> float:
    """One run, from data to `result.json` in `folder`. Returns: the best validation score.

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
    tracker = Tracker(settings, run.score, folder, console)
    failed = True
    try:
        console.print(
            f"{name}: {settings.train.steps} steps of {settings.train.meta_batch} tasks on {run.device}, "
            f"engine {run.train_engine.strategy}, statistics {settings.statistics}", highlight=False
        )  # fmt: skip
        with tracker.training():
            fitted = loop.fit(run, tracker, folder)
        result = tested(run, fitted.state, folder / "test_scores.csv") | {
            "name": name,
            "command": shlex.join(["metalearn", "train", *overrides]),
            "environment": environment,
            "val": {run.score.name: report.as_dict(fitted.best_val)},
            "best_step": fitted.best_step,
            "steps": fitted.steps,
            "seed": settings.seed,
            "engine": {"strategy": run.train_engine.strategy, "task_chunk": run.train_engine.chunk},
            "seconds": time.perf_counter() - start,
        }
        table = report.result_table([report.result_row(name, result)])
        report.write_json(folder / RESULT_FILE, result)
        tracker.finish(result, table)
        failed = False
    finally:
        tracker.close(failed)
    console.print(table)
    for file in (
        RESULT_FILE,
        "metrics.jsonl",
        "test_scores.csv",
        "learning_curve.png",
        "checkpoints/best.pt",
        CONFIG_FILE,
    ):
        console.print(f"  {folder / file}", highlight=False, soft_wrap=True)
    return fitted.best_val.mean


def evaluate(folder: Path, stored: DictConfig, changed: DictConfig, overrides: list[str], console: Console) -> None:
    """Tests the best checkpoint of a run under another configuration; writes `evaluations/<protocol_id>.json`.

    Where `overrides` change the method too (its inner steps, say), the file's name says so besides.
    Raises: UserError where the checkpoint cannot give what is asked, or has trained on the classes to be tested.
    """
    start = time.perf_counter()
    before, after = checked(stored), checked(changed)
    if after.statistics == "population" != before.statistics:
        raise UserError("statistics=population: this run gathered none; train with statistics=population")
    run = build(after)
    _refuse_known_classes(before, run)
    kept = checkpoint.load(folder / "checkpoints" / "best.pt", run.device)
    for part in ("meta", "fixed"):
        wanted, found = getattr(run.state, part), kept[part]
        if {n: v.shape for n, v in wanted.items()} != {n: v.shape for n, v in found.items()}:
            raise UserError(f"{folder}: its weights do not fit this configuration; change only the test's protocol")
    trained = json.loads((folder / RESULT_FILE).read_text())
    method = [word for word in overrides if word.startswith("algo.")]
    target = folder / "evaluations" / "-".join([run.protocol_id, *(word.removeprefix("algo.") for word in method)])
    try:
        target.parent.mkdir(exist_ok=True)
        result = tested(run, State(kept["meta"], kept["fixed"]), target.with_name(f"{target.name}.csv"))
        result |= {
            "name": trained["name"],
            "overrides": overrides,
            "seed": after.seed,
            "environment": report.environment(str(run.device)),
            "seconds": time.perf_counter() - start,
        }
        report.write_json(target.with_name(f"{target.name}.json"), result)
    except OSError as error:
        raise UserError(f"{target.parent} cannot be written ({error.strerror})") from None
    console.print(report.result_table([report.result_row(trained["name"], result)]))
    console.print(f"  {target}.json", highlight=False, soft_wrap=True)


def _refuse_known_classes(trained: RunConfig, run: Run) -> None:
    """Raises: UserError if classes to be tested were trained or validated on."""
    if trained.dataset == run.config.dataset:
        return
    origin = build(trained)
    if origin.content_hash == run.content_hash:
        known = origin.class_names["train"] | origin.class_names["val"]
        if shared := sorted(known & run.class_names["test"]):
            raise UserError(
                f"class '{shared[0]}' and {len(shared) - 1} others of this test split were trained or validated on; "
                "keep the split of the run"
            )


def tested(run: Run, state: State, scores_file: Path) -> dict[str, Any]:
    """Scores of the test episodes, into a file, and what they say together with their protocol."""
    scores = loop.test(run, state)
    if not scores.isfinite().all():
        raise loop.RunFailed(f"test {run.score.name} is not finite in {int((~scores.isfinite()).sum())} episodes")
    lines = [f"episode,{run.score.name}", *(f"{index},{value:.6f}" for index, value in enumerate(scores.tolist()))]
    scores_file.write_text("\n".join(lines) + "\n")
    return {
        "test": {run.score.name: report.as_dict(estimate(scores))},
        "protocol": run.protocol,
        "protocol_id": run.protocol_id,
    }


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
    console.print(f"  {sweep}", highlight=False, soft_wrap=True)
    return len(failures)


def _job_number(folder: Path) -> tuple[int, str]:
    return (int(folder.name) if folder.name.isdigit() else 1 << 30, folder.name)
