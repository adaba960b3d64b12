"""`metalearn evaluate`: tests a finished run again, under its own or a changed protocol, from its folder alone."""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor

from metalearn.config import components, composition, roles
from metalearn.config.checking import checked
from metalearn.config.schema import RunConfig
from metalearn.report import stats, tables
from metalearn.report.console import print_line
from metalearn.report.environment import describe_environment
from metalearn.report.plots import draw_lines
from metalearn.report.tables import shown_interval
from metalearn.run.build import (
    FREE_CHOICES,
    Run,
    algorithm_of,
    build,
    check_population,
    described,
    device_of,
    inductive_counterpart,
)
from metalearn.run.measure import measure, trained_state
from metalearn.run.train import ENGINE_FILE, RESULT_FILE
from metalearn.system.atomic import write_json
from metalearn.system.errors import RunFailed, UserError

_SPLITS = ("train", "val", "test")
_CURVES = {"shot": "shots", "steps": "inner steps"}
_SHOTS = (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50)
_STEPS = range(11)


def evaluate(
    folder: Path, overrides: list[str], split: str, curve: str | None, console: Console
) -> None:
    """Tests the best checkpoint; writes `evaluations/<protocol_id>.json` and what belongs to it.

    Where the backbone normalises, transductive and inductive statistics are both tested, on the same episodes.
    Args: overrides: of the test's protocol and the method's adaptation; split: whose classes are tested; curve: "shot",
      "steps" or None.
    Raises: UserError where the run cannot give what is asked; RunFailed where its predictions are not finite.
    """
    if split not in _SPLITS:
        raise UserError(f"split={split}: should be one of {', '.join(_SPLITS)}")
    if curve is not None and curve not in _CURVES:
        raise UserError(f"curve={curve}: should be one of {', '.join(_CURVES)}")
    asked = _Asked.of(folder, overrides, split)
    try:
        asked.folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{asked.folder} cannot be written ({error.strerror})") from None
    if curve is not None:
        _curve(asked, curve, console)
    else:
        _both(asked, console)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A finished run and what is asked of it.

    folder: where the answers go; variant: how the method adapts otherwise than in the run's own test.
    """

    folder: Path
    name: str
    before: RunConfig
    changed: DictConfig
    variant: list[str]
    overrides: list[str]
    split: str

    @staticmethod
    def of(folder: Path, overrides: list[str], split: str) -> "_Asked":
        try:
            name = json.loads((folder / RESULT_FILE).read_text())["name"]
        except (OSError, ValueError, TypeError, KeyError):
            raise UserError(
                f"run={folder}: no {RESULT_FILE} of a run there; name the folder of a finished training run"
            ) from None
        stored = composition.stored(folder)
        stored.engine.choices = None  # what the training used; its file may be gone
        for word in overrides:
            _check_may_change(stored, word)
        changed = composition.changed(stored, overrides)
        before, after = checked(stored), checked(changed)
        old, new = (
            components.component(settings.dataset, "dataset").target for settings in (before, after)
        )
        if old != new:
            raise UserError(
                f"dataset: the run learned {described(old)}, but this dataset has {described(new)}"
            )
        if (
            algorithm_of(after, is_restored=True).fixed_way
            and after.episode.way != before.episode.way
        ):
            raise UserError(
                f"episode.way={after.episode.way}: the run tells {before.episode.way} classes apart, the number of ways "
                "is part of its weights; train with that number"
            )
        variant = [
            f"{key}={value}"
            for key, value in sorted(after.algo.items())
            if before.algo[key] != value
        ]
        if after.engine.precision != before.engine.precision:
            variant.append(f"precision={after.engine.precision}")
        return _Asked(folder / "evaluations", name, before, changed, variant, overrides, split)

    @property
    def statistics(self) -> list[str]:
        """The statistics asked for first, then their counterpart; alone where nothing is normalised."""
        after = checked(self.changed)
        if not algorithm_of(after, is_restored=True).backbone.normalises:
            return [after.statistics]
        return [after.statistics, inductive_counterpart(self.before, after.statistics)]

    def run(self, statistics: str, **episode: int) -> Run:
        """The run under another protocol. Raises: UserError if classes to be tested were trained or validated on."""
        settings: Any = OmegaConf.merge(
            self.changed, {"statistics": statistics, "episode": episode}
        )
        if not self.overrides and not episode and self.split == "test":
            settings.engine = OmegaConf.merge(settings.engine, self._as_in_the_run())
        after, before = checked(settings), self.before
        check_population(before, after.statistics)
        run = build(after, self.split, is_restored=True)
        same_source = all(
            before.dataset.get(key) == after.dataset.get(key) for key in ("_target_", "path")
        )
        if self.split == "test" and same_source and before.dataset != after.dataset:
            own = dataclasses.replace(after, dataset=before.dataset, episode=before.episode)
            names = build(own, self.split, is_restored=True).class_names
            if shared := sorted(
                {*names["train"], *names["val"]} & set(run.class_names[self.split])
            ):
                raise UserError(
                    f"class '{shared[0]}' and {len(shared) - 1} others of this test split were trained or validated on; "
                    "keep the split of the run"
                )
        return run

    def _as_in_the_run(self) -> dict[str, Any]:
        """Engine settings with which the run's own test is repeated bit for bit, where this machine has its threads."""
        path = self.folder.parent / ENGINE_FILE
        free = {**FREE_CHOICES, "choices": None}
        try:
            found = json.loads(path.read_text())
            here = (
                found["threads"] <= (os.cpu_count() or 1)
                and found["device"] == device_of(self.before.device).type
            )
        except (OSError, ValueError, KeyError, TypeError):  # a run of an older version
            return {}
        return {**free, "choices": str(path)} if here else free

    def file(self, protocol_id: str, ending: str) -> Path:
        """Where the method adapts otherwise (its inner steps, say), the file's name says so besides."""
        return self.folder / ("-".join([protocol_id, *self.variant]) + ending)

    def described(self, run: Run) -> dict[str, Any]:
        """What a result says beside its figures."""
        return {
            "name": self.name,
            "overrides": self.overrides,
            "variant": self.variant,
            "split": self.split,
            "dataset": components.component(run.config.dataset, "dataset").__name__,
            "seed": run.config.seed,
            "environment": describe_environment(str(run.device)),
        }


def _check_may_change(stored: DictConfig, word: str) -> None:
    """Raises: UserError for a setting that a test does not have, or that only training reads."""
    key = word.split("=")[0].lstrip("+~")
    if key in ("algo", "backbone"):
        raise UserError(f"{word}: a run is tested with what it was trained with; train another one")
    plain: Any = OmegaConf.to_container(stored)
    described = roles.roles(plain)
    composition.changed(stored, [word])  # a mistyped key is reported as such
    if key in ("dataset", "episode") or roles.may_evaluate_with(key, described):
        return
    if key in described and (other := described[key].rule.get("in_testing")):
        raise UserError(
            f"{word}: only training reads this; did you mean {key.rpartition('.')[0]}.{other}?"
        )
    allowed = dict.fromkeys(
        ["algo", "dataset", "episode", *roles.names_of(described, roles.may_evaluate_with)]
    )
    names = [name for name in allowed if not name.startswith(("algo.", "episode."))]
    raise UserError(
        f"{word}: a test cannot change how the run was trained; it may change {', '.join(names)}"
    )


def _both(asked: _Asked, console: Console) -> None:
    """Tests under the statistics asked for and under their counterpart."""
    results: list[dict[str, Any]] = []
    scores: list[Tensor] = []
    for statistics in asked.statistics:
        start = time.perf_counter()
        run = asked.run(statistics)
        result, found = measure(
            run, trained_state(run, asked.folder.parent), asked.file(run.protocol_id, "_")
        )
        results.append(result | asked.described(run) | {"seconds": time.perf_counter() - start})
        scores.append(found)
    lines = []
    if len(results) == 2:
        transductive, inductive = sorted(
            (0, 1), key=lambda i: results[i]["protocol"]["statistics"] != "query"
        )
        difference = tables.as_dict(
            stats.paired_difference(scores[transductive], scores[inductive])
        )
        for result in results:
            result["transductive_minus_inductive"] = difference
        shown = tables.shown_difference(next(iter(results[0]["test"])), difference)
        lines.append(f"  transductive minus inductive, on the same episodes: {shown}")
    for result in results:
        file = asked.file(result["protocol_id"], ".json")
        write_json(file, result)
        lines.append(f"  {file}")
    name = " ".join([asked.name, *asked.variant])
    console.print(tables.result_table([tables.result_row(name, result) for result in results]))
    tables.print_details(console, results[0])
    for line in lines:
        print_line(console, line)


def _curve(asked: _Asked, curve: str, console: Console) -> None:
    """A score over shots or over inner steps, as a table, a CSV and a PNG."""
    statistics = asked.statistics[0]
    run = asked.run(statistics)
    if curve == "steps" and not run.algorithm.adapts_in_steps:
        raise UserError(
            f"curve=steps: {type(run.algorithm).__name__} does not adapt in steps; use curve=shot"
        )
    state = trained_state(run, asked.folder.parent)
    protocol, score = run.protocol, run.metric.name
    csv, png = (
        asked.file(run.protocol_id, f"_{curve}_curve{suffix}") for suffix in (".csv", ".png")
    )
    results: dict[int, dict[str, Any]] = {}
    ends = ""
    if curve == "steps":
        for steps in _STEPS:
            try:
                results[steps] = measure(run, state, steps=steps)[0]
            except RunFailed:
                if not results:
                    raise
                ends = f"  with {steps} inner steps predictions are no longer finite, so the curve ends before"
                break
    else:
        for shot in _SHOTS:
            try:
                run = asked.run(statistics, shot=shot)
            except (
                UserError
            ):  # the run's own protocol was possible, so a class is too small for these shots
                break
            results[shot] = measure(run, state)[0]
    label = _CURVES[curve]
    table, lines = [], [f"{curve},mean,ci95,episodes,protocol_id"]
    for at, result in results.items():
        found = result["test"][score]
        table.append(
            {
                label: at,
                f"{asked.split} {score}": shown_interval(score, found["mean"], found["ci95"]),
            }
        )
        lines.append(
            f"{at},{found['mean']:.6f},{found['ci95']:.6f},{found['episodes']},{result['protocol_id']}"
        )
    csv.write_text("\n".join(lines) + "\n")
    shape = [f"{protocol['way']}-way", *([] if curve == "shot" else [f"{protocol['shot']}-shot"])]
    title = f"{asked.name}, {', '.join(shape)}, {protocol['query']} queries, statistics {protocol['statistics']}"
    points = [
        (float(at), found["test"][score]["mean"], found["test"][score]["ci95"])
        for at, found in results.items()
    ]
    draw_lines({title: points}, label, f"{asked.split} {score}", png)
    console.print(tables.result_table(table))
    if ends:
        print_line(console, ends)
    for file in (csv, png):
        print_line(console, f"  {file}")
