"""`metalearn evaluate`: tests a finished run again, under its own or a changed protocol, from its folder alone."""

import json
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor

from metalearn import composition, config, report, stats
from metalearn.build import Run, build, normalises
from metalearn.config import RunConfig, checked
from metalearn.errors import UserError
from metalearn.figures import draw_curve, shown_interval
from metalearn.measure import measure, trained_state
from metalearn.verbs.train import RESULT_FILE

#: What may be changed for a test; everything else is part of how the run was trained.
_MAY_CHANGE = (
    "algo", "dataset", "episode", "episode_seed", "statistics", "test.episodes",
    "device", "data_dir", "cache_dir", "engine",
)  # fmt: skip
_CURVES = ("shot", "steps")
_SHOTS = (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50)
_STEPS = range(11)


def evaluate(folder: Path, overrides: list[str], split: str, curve: str | None, console: Console) -> None:
    """Tests the best checkpoint; writes `evaluations/<protocol_id>.json` and what belongs to it.

    Where the backbone normalises, transductive and inductive statistics are both tested, on the same episodes.
    Args: overrides: of the test's protocol and the method's adaptation; split: whose classes are tested; curve: "shot",
      "steps" or None.
    Raises: UserError where the run cannot give what is asked.
    """
    stored = _stored(folder)
    for word in overrides:
        key = word.split("=")[0].lstrip("+~")
        allowed = any(key == name or key.startswith(f"{name}.") for name in _MAY_CHANGE)
        if not allowed or key.startswith("episode.train"):
            composition.changed(stored, [word])  # a mistyped key is told as such
            raise UserError(
                f"{word}: a test cannot change how the run was trained; it may change {', '.join(_MAY_CHANGE)}"
            )
    changed = composition.changed(stored, overrides)
    before, after = checked(stored), checked(changed)
    fixed_way = config.component(after.algo, "algo").fixed_way
    if fixed_way and after.episode.way != before.episode.way:
        raise UserError(
            f"episode.way={after.episode.way}: the run tells {before.episode.way} classes apart, the number of ways is "
            "part of its weights; train with that number"
        )
    if split not in ("train", "val", "test"):
        raise UserError(f"split={split}: should be one of train, val, test")
    if curve is not None:
        _curve(folder, changed, before, overrides, split, curve, console)
        return
    results, scores = [], []
    for statistics in _statistics(before, after):
        result, found = _tested(folder, changed, statistics, before, overrides, split)
        results.append(result)
        scores.append(found)
    if len(results) == 2:
        transductive, inductive = sorted((0, 1), key=lambda i: results[i]["protocol"]["statistics"] != "query")
        difference = report.as_dict(stats.paired_difference(scores[transductive], scores[inductive]))
        for result in results:
            result["transductive_minus_inductive"] = difference
    for result in results:
        report.write_json(_file(folder, result["protocol_id"], overrides, ".json"), result)
    console.print(report.result_table([report.result_row(result["name"], result) for result in results]))
    report.print_details(console, results[0])
    if len(results) == 2:
        score = next(iter(results[0]["test"]))
        console.print(
            f"  transductive minus inductive, on the same episodes: {report.shown_difference(score, difference)}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    for result in results:
        console.print(f"  {_file(folder, result['protocol_id'], overrides, '.json')}", highlight=False, soft_wrap=True)


def _stored(folder: Path) -> DictConfig:
    if not (folder / RESULT_FILE).is_file():
        raise UserError(f"run={folder}: no {RESULT_FILE} there; name the folder of a finished training run")
    return composition.stored(folder)


def _statistics(before: RunConfig, after: RunConfig) -> list[str]:
    """The statistics asked for first, then their counterpart; alone where nothing is normalised."""
    if not normalises(after):
        return [after.statistics]
    inductive = "population" if before.statistics == "population" else "support"
    return [after.statistics, inductive if after.statistics == "query" else "query"]


def _run(changed: DictConfig, statistics: str, before: RunConfig, split: str, **episode: int) -> Run:
    """The run with another protocol. Raises: UserError if the classes to be tested were trained or validated on."""
    settings = OmegaConf.merge(changed, {"statistics": statistics, "episode": episode})
    after = checked(settings)  # type: ignore[arg-type]
    if after.statistics == "population" != before.statistics:
        raise UserError("statistics=population: this run gathered none; train with statistics=population")
    run = build(after, split)
    if before.dataset != after.dataset:
        origin = build(before)
        known = {*origin.class_names["train"], *origin.class_names["val"]}
        shared = sorted(known & set(run.class_names[split]))
        if shared and origin.content_hash == run.content_hash:
            raise UserError(
                f"class '{shared[0]}' and {len(shared) - 1} others of this {split} split were trained or validated on; "
                "keep the split of the run"
            )
    return run


def _tested(
    folder: Path, changed: DictConfig, statistics: str, before: RunConfig, overrides: list[str], split: str
) -> tuple[dict[str, Any], Tensor]:
    start = time.perf_counter()
    run = _run(changed, statistics, before, split)
    state = trained_state(run, folder)
    try:
        files = _file(folder, run.protocol_id, overrides, "_")
        files.parent.mkdir(exist_ok=True)
        result, scores = measure(run, state, files)
    except OSError as error:
        raise UserError(f"{folder / 'evaluations'} cannot be written ({error.strerror})") from None
    return result | {
        "name": json.loads((folder / RESULT_FILE).read_text())["name"],
        "overrides": overrides,
        "split": split,
        "seed": run.config.seed,
        "environment": report.environment(str(run.device)),
        "seconds": time.perf_counter() - start,
    }, scores


def _file(folder: Path, protocol_id: str, overrides: list[str], ending: str) -> Path:
    """A file under `evaluations/`. Where the method changes too (its inner steps, say), the name says so besides."""
    method = [word.removeprefix("algo.") for word in overrides if word.startswith("algo.")]
    return folder / "evaluations" / ("-".join([protocol_id, *method]) + ending)


def _curve(
    folder: Path, changed: DictConfig, before: RunConfig, overrides: list[str], split: str, curve: str, console: Console
) -> None:
    """Accuracy over shots or over inner steps, as a table, a CSV and a PNG."""
    if curve not in _CURVES:
        raise UserError(f"curve={curve}: should be one of {', '.join(_CURVES)}")
    statistics = checked(changed).statistics
    run = _run(changed, statistics, before, split)
    state = trained_state(run, folder)
    if curve == "steps" and "test_inner_steps" not in run.config.algo:
        raise UserError(f"curve=steps: {type(run.algorithm).__name__} does not adapt in steps; use curve=shot")
    files = _file(folder, run.protocol_id, overrides, f"_{curve}_")
    files.parent.mkdir(exist_ok=True)
    score = run.score.name
    rows = []
    if curve == "steps":
        for steps in _STEPS:
            result, _ = measure(run, state, steps=steps)
            rows.append((steps, result))
    else:
        for shot in _SHOTS:
            try:
                run = _run(changed, statistics, before, split, shot=shot)
            except UserError:  # a class has fewer pictures than these shots and the queries want
                break
            result, _ = measure(run, state)
            rows.append((shot, result))
    label = {"steps": "inner steps", "shot": "shots"}[curve]
    points = [(at, result["test"][score]["mean"], result["test"][score]["ci95"]) for at, result in rows]
    lines = [f"{curve},mean,ci95,episodes,protocol_id"]
    for at, result in rows:
        found = result["test"][score]
        lines.append(f"{at},{found['mean']:.6f},{found['ci95']:.6f},{found['episodes']},{result['protocol_id']}")
    csv, png = files.with_name(f"{files.name}curve.csv"), files.with_name(f"{files.name}curve.png")
    csv.write_text("\n".join(lines) + "\n")
    name = json.loads((folder / RESULT_FILE).read_text())["name"]
    protocol = run.protocol
    title = f"{name}, {protocol['way']}-way, {protocol['query']} queries, statistics {protocol['statistics']}"
    draw_curve(points, label, score, title, png)
    table = [{label: at, f"test {score}": shown_interval(score, mean, ci95)} for at, mean, ci95 in points]
    console.print(report.result_table(table))
    for path in (csv, png):
        console.print(f"  {path}", highlight=False, soft_wrap=True)
