"""Test a finished run again, under its own or a different protocol, from its folder alone."""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from metalearn.report import stats, tables
from metalearn.report.console import print_lines
from metalearn.report.plots import draw_lines
from metalearn.report.result import Result
from metalearn.report.scores import write_csv
from metalearn.run.corruption import corrupted
from metalearn.run.measure import trained_state
from metalearn.run.other_data import Target
from metalearn.run.request import Request
from metalearn.system.atomic import make_writable
from metalearn.system.errors import RunFailed, UserError

#: Curves: the label of each, and where it is measured; the first number is the lowest possible.
_CURVES = {
    "shot": ("shots", [1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50]),
    "way": ("ways", [2, 3, 4, 5, 7, 10, 15, 20, 30, 50]),
    "steps": ("inner steps", list(range(11))),
}
#: The same of queries that are made harder to read, by severity in percent.
_SEVERITIES = {
    "noise": ("noise, standard deviation in % of the range of pixels", [0, 5, 10, 20, 30, 50]),
    "occlusion": ("covered share of each query (%)", [0, 5, 10, 20, 30, 50]),
}


def evaluate(
    folder: Path,
    overrides: list[str],
    split: str,
    curve: str | None,
    console: Console,
    points: str | None = None,
    corrupt: str | None = None,
) -> dict[str, Any]:
    """Test the best checkpoint of a run and write `evaluations/<protocol_id>.json`.

    If the backbone normalises and the method is not transductive itself, transductive and inductive
    statistics are both tested, on the same episodes.

    Args:
        folder: The run folder.
        overrides: Changes of the test's protocol and of the method's adaptation.
        split: The split whose classes are tested; "all" tests all classes of a dataset that the
            run was not trained on.
        curve: "shot", "way", "steps" or None.
        console: Where to print.
        points: Where to measure the curve, like "1,5,10"; None: the default of the curve.
        corrupt: "noise" or "occlusion" of the queries, for a curve over its severity; or None.

    Returns:
        "results", as the files hold them, or the "curve" and its "points"; and the "files".

    Raises:
        UserError: If the run cannot be tested like this.
        RunFailed: If predictions are not finite.
    """
    if curve is not None and curve not in _CURVES:
        raise UserError(f"curve={curve}: should be one of {', '.join(_CURVES)}")
    if corrupt is not None and corrupt not in _SEVERITIES:
        raise UserError(f"corrupt={corrupt}: should be one of {', '.join(_SEVERITIES)}")
    if curve is not None and corrupt is not None:
        raise UserError(f"corrupt={corrupt}: has a curve of its own; remove curve={curve}")
    curve = curve or corrupt
    numbers = _numbers(points, curve) if points else []
    request = open_request(folder, overrides, split)
    if curve is not None:
        return _curve(request, curve, numbers, console)
    return _both(request, console)


def evaluate_several(
    folders: Sequence[Path],
    words: Sequence[str],
    overrides: list[str],
    split: str,
    console: Console,
) -> dict[str, Any]:
    """Test each of several runs on each of several datasets, and print one table.

    Each test has the statistics of its run, or those in `overrides`, and is written as
    `evaluate` does. A test that is impossible is a line below the table.

    Args:
        folders: The run folders.
        words: The datasets, as `Target.of` takes them; [] for those of the runs.
        overrides: As in `evaluate`, for all tests.
        split: The split of the datasets that name none.
        console: Where to print.

    Returns:
        "results", as the files hold them; the "files"; and "failures": run, dataset and reason.

    Raises:
        UserError: If no test is possible.
    """
    targets = [Target.of(word) for word in words] or [Target("own", [], None)]
    rows, measured, files = [], [], []
    failures: list[dict[str, str]] = []
    errors: list[Exception] = []
    for target, folder in itertools.product(targets, folders):
        try:
            request = open_request(folder, [*target.overrides, *overrides], target.split or split)
            result, _ = _measured(request, request.statistics[0])
        except (UserError, RunFailed) as error:
            errors.append(error)
            reason = {"run": str(folder), "dataset": target.label, "reason": str(error)}
            failures.append(reason)
            continue
        files.append(request.file(result.protocol_id, ".json"))
        result.write(files[-1])
        measured.append(result)
        name = f"{request.own.name} ({folder.name})" if len(folders) > 1 else request.own.name
        rows.append(tables.test_row(target.label, name, result))
    if not rows:
        raise errors[0]
    console.print(tables.result_table(rows, wrapping=2))
    for row, result in zip(rows, measured, strict=True):
        owner = f"{row['run']} on {row['dataset']}: "
        tables.print_generalised(console, result, owner)
        tables.print_pretraining(console, result, owner)
    print_lines(console, ("{run} on {dataset}: {reason}".format(**one) for one in failures))
    print_lines(console, files, "  ")
    results = [result.to_dict() for result in measured]
    return {"results": results, "files": list(map(str, files)), "failures": failures}


def open_request(folder: Path, overrides: list[str], split: str) -> Request:
    """Return the request, whose run folder can be written; arguments as in `evaluate`."""
    request = Request.of(folder, overrides, split)
    make_writable(request.files.evaluations)
    return request


def _measured(request: Request, statistics: str) -> tuple[Result, Tensor]:
    """Test under some statistics; return the result and the score of each episode."""
    start = time.perf_counter()
    run = request.run(statistics)
    state = trained_state(run, request.files.path)
    result, scores = request.measure(run, state, request.file(run.protocol_id, "_"))
    result.seconds = time.perf_counter() - start
    return result, scores


def _numbers(points: str, curve: str | None) -> list[int]:
    """Return the numbers in a list like "1,5,10", in ascending order."""
    if curve is None:
        kinds = f"curve={'|'.join(_CURVES)} or corrupt={'|'.join(_SEVERITIES)}"
        raise UserError(f"at={points}: belongs to a curve; add {kinds}")
    lowest = (_CURVES | _SEVERITIES)[curve][1][0]
    words = points.strip("[]").split(",")
    if not all(word.isdecimal() and int(word) >= lowest for word in words):
        raise UserError(f"at={points}: should be numbers of at least {lowest}, like at=5,10,20")
    return sorted({int(word) for word in words})


def _both(request: Request, console: Console) -> dict[str, Any]:
    """Test under the requested statistics and under their counterpart."""
    tested = {statistics: _measured(request, statistics) for statistics in request.statistics}
    results = [result for result, _ in tested.values()]
    lines: list[object] = []
    if len(results) == 2:
        # Transductive ones first.
        (_, a), (_, b) = (tested[one] for one in sorted(tested, key=lambda one: one != "query"))
        difference = stats.paired_difference(a, b)
        for result in results:
            result.transductive_minus_inductive = difference
        text = tables.format_difference(results[0].metric, difference)
        lines.append(f"transductive minus inductive, on the same episodes: {text}")
    if request.overlap:
        lines.append(f"test.overlap=allow: {request.overlap}")
    files = [request.file(result.protocol_id, ".json") for result in results]
    for result, file in zip(results, files, strict=True):
        result.write(file)
    name = " ".join([request.own.name, *request.variant])
    console.print(tables.result_table([tables.result_row(name, result) for result in results]))
    tables.print_details(console, results[0])
    print_lines(console, [*lines, *files], "  ")
    return {"results": [one.to_dict() for one in results], "files": list(map(str, files))}


@dataclasses.dataclass(frozen=True)
class Curve:
    """A score over a number."""

    label: str  # what the number counts
    heading: str  # split and metric
    title: str  # name of the run and what all points share
    protocol_id: str  # of the test that the points change
    results: dict[int, Result]  # at each number
    note: str  # why the curve ends early, or ""

    def draw(self, path: Path) -> None:
        """Plot the curve into a PNG file."""
        points = [(float(x), one.test.mean, one.test.ci95) for x, one in self.results.items()]
        draw_lines({self.title: points}, self.label, self.heading, path)


def measure_curve(request: Request, curve: str, numbers: list[int]) -> Curve:
    """Measure a run at numbers of shots, ways, inner steps or severities.

    [] for the usual numbers, as far as the data suffice. Raise UserError if the method has no such
    curve, or the data do not suffice, RunFailed if the first predictions are not finite.
    """
    statistics = request.statistics[0]
    run = request.run(statistics)
    if curve == "steps" and not run.algorithm.adapts_in_steps:
        name = type(run.algorithm).__name__
        raise UserError(f"{name} does not adapt in steps, so it has no curve over them")
    if curve == "way" and run.algorithm.fixed_way:
        raise UserError(
            f"curve=way: the run distinguishes {run.spec.way} classes, the number of ways is part "
            "of its weights; use curve=shot"
        )
    label, usual = (_CURVES | _SEVERITIES)[curve]
    state = trained_state(run, request.files.path)
    protocol = run.protocol
    results: dict[int, Result] = {}
    note = ""
    for number in numbers or usual:
        steps = number if curve == "steps" else None
        try:
            own = corrupted(run, curve, number) if curve in _SEVERITIES else run
            if curve in ("shot", "way"):
                own = request.run(statistics, **{curve: number})
            results[number] = request.measure(own, state, steps=steps)[0]
        except UserError:  # the split has too few classes, or a class too few examples
            if numbers or not results:
                raise
            break
        except RunFailed:
            if not results:
                raise
            note = f"predictions with {number} {label} are not finite; the curve ends here"
            break
    shape = [f"{protocol[name]}-{name}" for name in ("way", "shot") if name != curve]
    title = (
        f"{request.own.name}, {', '.join(shape)}, {protocol['query']} queries, "
        f"statistics {protocol['statistics']}"
    )
    heading = f"{request.split} {run.metric.name}"
    return Curve(label, heading, title, run.protocol_id, results, note)


def _curve(request: Request, curve: str, numbers: list[int], console: Console) -> dict[str, Any]:
    """Measure a curve; print a table, write a CSV and a PNG."""
    measured = measure_curve(request, curve, numbers)
    results, metric = measured.results, next(iter(measured.results.values())).metric
    name = f"_{curve}_curve"
    files = [request.file(measured.protocol_id, name + suffix) for suffix in (".csv", ".png")]
    points = [
        {curve: x, **dataclasses.asdict(result.test), "protocol_id": result.protocol_id}
        for x, result in results.items()
    ]
    cells = (one | {key: f"{one[key]:.6f}" for key in ("mean", "ci95")} for one in points)
    write_csv(files[0], points[0], (row.values() for row in cells))
    measured.draw(files[1])
    rows = [
        {measured.label: x, measured.heading: tables.format_score(metric, result.test)}
        for x, result in results.items()
    ]
    console.print(tables.result_table(rows))
    print_lines(console, [*filter(None, [measured.note]), *files], "  ")
    return {"curve": curve, "metric": metric, "points": points, "files": list(map(str, files))}
