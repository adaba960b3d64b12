"""Test a finished run again, under its own or a different protocol, from its folder alone."""

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
from metalearn.config.checking import check_config
from metalearn.config.schema import RunConfig
from metalearn.report import stats, tables
from metalearn.report.console import print_line
from metalearn.report.environment import describe_environment
from metalearn.report.folder import RunFolder
from metalearn.report.plots import draw_lines
from metalearn.report.result import Result
from metalearn.report.scores import write_csv
from metalearn.report.tables import format_interval
from metalearn.run import checkpoint
from metalearn.run.build import Run, build
from metalearn.run.engines import FREE_CHOICES
from metalearn.run.measure import measure, trained_state
from metalearn.run.pairings import check_population, inductive_counterpart, target_name
from metalearn.run.parts import algorithm_of, device_of
from metalearn.system.errors import RunFailed, UserError

_SPLITS = ("train", "val", "test")
_CURVES = {"shot": "shots", "steps": "inner steps"}
_SHOTS = (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50)
_STEPS = range(11)


def evaluate(
    folder: Path, overrides: list[str], split: str, curve: str | None, console: Console
) -> None:
    """Test the best checkpoint of a run and write `evaluations/<protocol_id>.json`.

    If the backbone normalises, transductive and inductive statistics are both tested, on the same
    episodes.

    Args:
        folder: The run folder.
        overrides: Changes of the test's protocol and of the method's adaptation.
        split: The split whose classes are tested.
        curve: "shot", "steps" or None.
        console: Where to print.

    Raises:
        UserError: If the run cannot be tested like this.
        RunFailed: If predictions are not finite.
    """
    if split not in _SPLITS:
        raise UserError(f"split={split}: should be one of {', '.join(_SPLITS)}")
    if curve is not None and curve not in _CURVES:
        raise UserError(f"curve={curve}: should be one of {', '.join(_CURVES)}")
    request = _Request.of(folder, overrides, split)
    try:
        request.files.evaluations.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{request.files.evaluations} cannot be written ({error.strerror})"
        ) from None
    if curve is not None:
        _curve(request, curve, console)
    else:
        _both(request, console)


@dataclasses.dataclass(frozen=True)
class _Request:
    """A finished run and the requested test.

    Attributes:
        files: The run folder.
        name: Name of the run.
        before: The run's configuration.
        changed: The configuration of the test.
        variant: Settings of the adaptation that differ from the run's own test.
        overrides: The given changes.
        split: The split whose classes are tested.
    """

    files: RunFolder
    name: str
    before: RunConfig
    changed: DictConfig
    variant: list[str]
    overrides: list[str]
    split: str

    @staticmethod
    def of(folder: Path, overrides: list[str], split: str) -> "_Request":
        files = RunFolder(folder)
        try:
            name = files.read_result().name
        except UserError:
            raise UserError(
                f"run={folder}: no {files.result.name} of a run there; name the folder of a "
                "finished training run"
            ) from None
        stored = composition.load_config(folder)
        stored.engine.choices = None  # the training's; the file may be gone
        for word in overrides:
            _check_may_change(stored, word)
        changed = composition.apply_overrides(stored, overrides)
        before, after = check_config(stored), check_config(changed)
        old, new = (
            components.component(settings.dataset, "dataset").target for settings in (before, after)
        )
        if old != new:
            raise UserError(
                f"dataset: the run learned {target_name(old)}, but this dataset has "
                f"{target_name(new)}"
            )
        has_fixed_way = algorithm_of(after, is_restored=True).fixed_way
        if has_fixed_way and after.episode.way != before.episode.way:
            raise UserError(
                f"episode.way={after.episode.way}: the run distinguishes {before.episode.way} "
                "classes, the number of ways is part of its weights; train with that number"
            )
        variant = [
            f"{key}={value}"
            for key, value in sorted(after.algo.items())
            if before.algo[key] != value
        ]
        if after.engine.precision != before.engine.precision:
            variant.append(f"precision={after.engine.precision}")
        return _Request(files, name, before, changed, variant, overrides, split)

    @property
    def statistics(self) -> list[str]:
        """The requested statistics, then their counterpart if the backbone normalises."""
        after = check_config(self.changed)
        backbone = algorithm_of(after, is_restored=True).backbone
        if not backbone.normalises or backbone.is_external:
            return [after.statistics]
        return [after.statistics, inductive_counterpart(self.before, after.statistics)]

    def run(self, statistics: str, **episode: int) -> Run:
        """Build the run under the requested protocol.

        Raises:
            UserError: If tested classes were used for training or validation.
        """
        settings: Any = OmegaConf.merge(
            self.changed, {"statistics": statistics, "episode": episode}
        )
        if not self.overrides and not episode and self.split == "test":
            settings.engine = OmegaConf.merge(settings.engine, self._engine_of_run())
        after, before = check_config(settings), self.before
        check_population(before, after.statistics)
        channels = checkpoint.channels(self.files.best)
        run = build(after, self.split, is_restored=True, channels=channels)
        same_source = all(
            before.dataset.get(key) == after.dataset.get(key) for key in ("_target_", "path")
        )
        if self.split == "test" and same_source and before.dataset != after.dataset:
            own = dataclasses.replace(after, dataset=before.dataset, episode=before.episode)
            names = build(own, self.split, is_restored=True).class_names
            used = {*names["train"], *names["val"]}
            if shared := sorted(used & set(run.class_names[self.split])):
                raise UserError(
                    f"class '{shared[0]}' and {len(shared) - 1} others of this test split were "
                    "trained or validated on; keep the split of the run"
                )
        return run

    def _engine_of_run(self) -> dict[str, Any]:
        """Return engine settings that repeat the run's own test bit for bit, if possible here."""
        free = {**FREE_CHOICES, "choices": None}
        try:
            choices = json.loads(self.files.engine.read_text())
            is_possible = (
                choices["threads"] <= (os.cpu_count() or 1)
                and choices["device"] == device_of(self.before.device).type
            )
        except (OSError, ValueError, KeyError, TypeError):  # a run of an earlier version
            return {}
        return {**free, "choices": str(self.files.engine)} if is_possible else free

    def file(self, protocol_id: str, ending: str) -> Path:
        """Return an output file; its name contains how the adaptation differs."""
        name = "-".join([protocol_id, *self.variant]) + ending
        return self.files.evaluations / name

    def measure(
        self, run: Run, state: Any, prefix: Path | None = None, steps: int | None = None
    ) -> tuple[Result, Tensor]:
        """Test the run. See `metalearn.run.measure.measure`."""
        environment = describe_environment(str(run.device))
        result, scores = measure(run, state, self.name, environment, prefix, steps)
        result.evaluation = {
            "overrides": self.overrides,
            "variant": self.variant,
            "dataset": components.component(run.config.dataset, "dataset").__name__,
        }
        return result, scores


def _check_may_change(stored: DictConfig, word: str) -> None:
    """Raise UserError for a setting that does not exist or that only training reads."""
    key = word.split("=")[0].lstrip("+~")
    if key in ("algo", "backbone"):
        raise UserError(f"{word}: a run is tested with what it was trained with; train another one")
    plain: Any = OmegaConf.to_container(stored)
    known = roles.roles(plain)
    composition.apply_overrides(stored, [word])  # a mistyped key is reported as such
    if key in ("dataset", "episode") or roles.may_evaluate_with(key, known):
        return
    if key in known and (other := known[key].rule.get("in_testing")):
        raise UserError(
            f"{word}: only training reads this; did you mean {key.rpartition('.')[0]}.{other}?"
        )
    allowed = dict.fromkeys(
        ["algo", "dataset", "episode", *roles.names_of(known, roles.may_evaluate_with)]
    )
    names = [name for name in allowed if not name.startswith(("algo.", "episode."))]
    raise UserError(
        f"{word}: a test cannot change how the run was trained; it may change {', '.join(names)}"
    )


def _both(request: _Request, console: Console) -> None:
    """Test under the requested statistics and under their counterpart."""
    results: list[Result] = []
    scores: list[Tensor] = []
    for statistics in request.statistics:
        start = time.perf_counter()
        run = request.run(statistics)
        state = trained_state(run, request.files.path)
        result, own = request.measure(run, state, request.file(run.protocol_id, "_"))
        result.seconds = time.perf_counter() - start
        results.append(result)
        scores.append(own)
    lines = []
    if len(results) == 2:
        transductive, inductive = sorted(
            (0, 1), key=lambda i: results[i].protocol["statistics"] != "query"
        )
        difference = stats.paired_difference(scores[transductive], scores[inductive])
        for result in results:
            result.transductive_minus_inductive = difference
        text = tables.format_difference(results[0].metric, difference)
        lines.append(f"  transductive minus inductive, on the same episodes: {text}")
    for result in results:
        file = request.file(result.protocol_id, ".json")
        result.write(file)
        lines.append(f"  {file}")
    name = " ".join([request.name, *request.variant])
    console.print(tables.result_table([tables.result_row(name, result) for result in results]))
    tables.print_details(console, results[0])
    for line in lines:
        print_line(console, line)


def _curve(request: _Request, curve: str, console: Console) -> None:
    """Measure over shots or inner steps; print a table, write a CSV and a PNG."""
    statistics = request.statistics[0]
    run = request.run(statistics)
    if curve == "steps" and not run.algorithm.adapts_in_steps:
        raise UserError(
            f"curve=steps: {type(run.algorithm).__name__} does not adapt in steps; use curve=shot"
        )
    state = trained_state(run, request.files.path)
    protocol, metric = run.protocol, run.metric.name
    table_file, plot_file = (
        request.file(run.protocol_id, f"_{curve}_curve{suffix}") for suffix in (".csv", ".png")
    )
    results: dict[int, Result] = {}
    note = ""
    if curve == "steps":
        for steps in _STEPS:
            try:
                results[steps] = request.measure(run, state, steps=steps)[0]
            except RunFailed:
                if not results:
                    raise
                note = f"  predictions with {steps} inner steps are not finite; the curve ends here"
                break
    else:
        for shot in _SHOTS:
            try:
                run = request.run(statistics, shot=shot)
            except UserError:  # a class has too few examples for these shots
                break
            results[shot] = request.measure(run, state)[0]
    label, heading = _CURVES[curve], f"{request.split} {metric}"
    rows = [
        {label: x, heading: format_interval(metric, result.test.mean, result.test.ci95)}
        for x, result in results.items()
    ]
    write_csv(
        table_file,
        (curve, "mean", "ci95", "episodes", "protocol_id"),
        (
            (x, f"{test.mean:.6f}", f"{test.ci95:.6f}", test.episodes, result.protocol_id)
            for x, result in results.items()
            for test in (result.test,)
        ),
    )
    shape = [f"{protocol['way']}-way", *([] if curve == "shot" else [f"{protocol['shot']}-shot"])]
    title = (
        f"{request.name}, {', '.join(shape)}, {protocol['query']} queries, "
        f"statistics {protocol['statistics']}"
    )
    points = [(float(x), result.test.mean, result.test.ci95) for x, result in results.items()]
    draw_lines({title: points}, label, heading, plot_file)
    console.print(tables.result_table(rows))
    if note:
        print_line(console, note)
    for file in (table_file, plot_file):
        print_line(console, f"  {file}")
