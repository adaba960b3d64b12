"""Tables and lines that people read, on the console and in Markdown."""

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metalearn.report.console import print_line
from metalearn.report.result import Result
from metalearn.report.stats import Difference
from metalearn.tasks.types import Estimate


def format_value(metric: str, value: float) -> str:
    """Return a value of a metric as text: an accuracy in percent, others as they are."""
    if metric == "accuracy":
        return f"{100 * value:.2f}%"
    return f"{value:.2f}" if metric == "return" else f"{value:.4f}"


def format_interval(metric: str, mean: float, ci95: float) -> str:
    """Return a mean with the half-width of its interval as text."""
    return f"{format_value(metric, mean)} ± {format_value(metric, ci95)}"


def format_score(metric: str, score: Estimate | None) -> str:
    """Return a score with the half-width of its interval as text; "" for None."""
    return format_interval(metric, score.mean, score.ci95) if score else ""


def result_table(rows: list[dict[str, Any]], wrapping: int = 1) -> Table:
    """Return a console table of rows: column heading -> value.

    The first `wrapping` columns may wrap; numbers are never cut.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(rows[0]):
        may_wrap = number < wrapping
        width = 12 if may_wrap else min(16, len(column))
        table.add_column(column, no_wrap=not may_wrap, overflow="fold", min_width=width)
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row.values()))
    return table


def least_width(rows: list[dict[str, Any]], first: int) -> int:
    """Return the width of a `result_table` whose first column has `first` characters."""
    total = first + 2
    for heading in list(rows[0])[1:]:
        lines = "\n".join([heading, *(str(row[heading]) for row in rows)]).split("\n")
        total += max(min(16, len(heading)), *map(len, lines)) + 3
    return total


def print_details(console: Console, result: Result) -> None:
    """Print the worst episodes and classes, calibration, and how many episodes ±0.10% needs."""
    metric, details = result.metric, result.details
    parts = []
    if "worst_decile" in details:
        worst = format_value(metric, details["worst_decile"]["mean"])
        parts.append(f"worst tenth of the episodes {worst}")
    for name, share in list(details.get("worst_classes", {}).items())[:1]:
        parts.append(f"worst class {name} {format_value(metric, share)}")
    if (error := details.get("expected_calibration_error")) is not None:
        parts.append(f"calibration error {format_value(metric, error)}")
    if (episodes := details.get("episodes_needed", {}).get("0.001")) is not None:
        parts.append(f"±0.10% needs {episodes:,} episodes")
    print_line(console, f"  {result.protocol['statistics']} statistics: {'; '.join(parts)}")
    print_generalised(console, result)
    print_pretraining(console, result)


def print_pretraining(console: Console, result: Result, owner: str = "") -> None:
    """Print which test classes the data of pretrained weights contain, if there are such."""
    if pretraining := result.details.get("pretraining"):
        data, shared = pretraining["data"], pretraining["shared"]
        text = "it may contain test classes"
        if shared:
            names = f"{', '.join(shared[:5])}{', …' if len(shared) > 5 else ''}"
            number = f"at least {len(shared)} of the {pretraining['classes']} test classes"
            text = f"which contains {number}, by their names: {names}"
        print_line(console, f"  {owner}pretrained on {data or 'data that are not stated'}, {text}")


def print_generalised(console: Console, result: Result, owner: str = "") -> None:
    """Print the accuracy on base and novel classes, if the episodes have both."""
    if not (own := result.details.get("generalised")):
        return
    names = {"base": "base classes", "novel": "novel classes", "harmonic_mean": "harmonic mean"}
    parts = [
        f"{text} {format_score(result.metric, Estimate(**own[name]))}"
        for name, text in names.items()
    ]
    is_seen = own["base_images_were_trained_on"]
    seen = "; images of base classes were seen in training" if is_seen else ""
    print_line(console, f"  {owner}{', '.join(parts)}{seen}")


def format_difference(metric: str, difference: Difference) -> str:
    """Return a paired difference as text, in percentage points for an accuracy."""
    factor, digits, unit = (100, 2, " points") if metric == "accuracy" else (1, 4, "")
    mean = round(factor * difference.mean, digits) + 0.0  # no minus before a zero
    p = "< 0.001" if difference.p_value < 0.001 else f"= {difference.p_value:.3f}"
    return f"{mean:+.{digits}f} ± {factor * difference.ci95:.{digits}f}{unit} (p {p})"


def markdown_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table. rows: column heading -> value."""
    cells = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return ["| " + " | ".join(str(cell) for cell in row) + " |" for row in cells]


def result_line(result: Result) -> str:
    """Return the score of a result in words."""
    return f"{result.split} {result.metric} {format_score(result.metric, result.test)}"


def trial_row(name: str, result: Result) -> dict[str, Any]:
    """Return a row for `result_table`: a trial of a search, with its validation score."""
    metric, training = result.metric, result.training
    return {
        "trial": name,
        f"val {metric}": format_score(metric, Estimate(**training["val"][metric])),
        "best step": training["best_step"],
        f"test {metric}": format_score(metric, result.test if result.split == "test" else None),
        "minutes": f"{result.seconds / 60:.1f}",
    }


def result_row(name: str, result: Result) -> dict[str, Any]:
    """Return a row for `result_table`."""
    return {
        "run": name,
        "episode": result.shape,
        "statistics": result.statistics,
        f"{result.split} {result.metric}": format_score(result.metric, result.test),
        "protocol": result.protocol_id,
        "minutes": f"{result.seconds / 60:.1f}",
    }


def test_row(dataset: str, name: str, result: Result) -> dict[str, Any]:
    """Return a row for `result_table`: a test of one of several runs on one of several datasets."""
    mark = " (overlap)" if result.evaluation.get("overlap") else ""
    return {
        "dataset": dataset + mark,
        "run": name,
        "split": result.split,
        "classes": result.protocol.get("num_classes", ""),
        "episode": result.shape,
        "statistics": result.statistics,
        "score": format_score(result.metric, result.test),
        "protocol": result.protocol_id,
    }
