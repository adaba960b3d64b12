"""What a finished run leaves: `result.json` with its environment, and the tables people read."""

import dataclasses
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metalearn.report.console import print_line
from metalearn.report.stats import Difference
from metalearn.tasks.types import Estimate


def shown(score: str, value: float) -> str:
    """A score as people read it: an accuracy as a percentage, an error as it is."""
    return f"{100 * value:.2f}%" if score == "accuracy" else f"{value:.4f}"


def shown_interval(score: str, mean: float, ci95: float) -> str:
    """A mean with the half-width of its interval."""
    return f"{shown(score, mean)} ± {shown(score, ci95)}"


def as_dict(estimate: Estimate | Difference) -> dict[str, Any]:
    return dataclasses.asdict(estimate)


def result_table(rows: list[dict[str, Any]]) -> Table:
    """One line a result; each row is a dict of column heading to text."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(rows[0]):  # only the first may wrap: figures are never cut
        table.add_column(
            column,
            no_wrap=number > 0,
            overflow="fold",
            min_width=min(16, len(column)) if number else 12,
        )
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row.values()))
    return table


def print_details(console: Console, result: dict[str, Any]) -> None:
    """What a mean hides: the worst episodes and classes, calibration, and the episodes a narrower interval wants."""
    score, details = next(iter(result["test"])), result["details"]
    parts = [f"worst tenth of the episodes {shown(score, details['worst_decile']['mean'])}"]
    if "worst_classes" in details:
        parts += [
            f"worst class {name} {shown(score, share)}"
            for name, share in [*details["worst_classes"].items()][:1]
        ]
        parts.append(f"calibration error {shown(score, details['expected_calibration_error'])}")
        parts.append(f"±0.10% wants {details['episodes_needed']['0.001']:,} episodes")
    print_line(console, f"  {result['protocol']['statistics']} statistics: {'; '.join(parts)}")


def shown_difference(score: str, difference: dict[str, Any]) -> str:
    """A paired difference as people read it, in points where the score is an accuracy."""
    factor, digits, unit = (100, 2, " points") if score == "accuracy" else (1, 4, "")
    p, mean = (
        difference["p_value"],
        round(factor * difference["mean"], digits) + 0.0,
    )  # no minus before a zero
    return (
        f"{mean:+.{digits}f} ± {factor * difference['ci95']:.{digits}f}{unit}"
        f" (p {'< 0.001' if p < 0.001 else f'= {p:.3f}'})"
    )


def markdown_table(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of a Markdown table; each row is a dict of column heading to text."""
    cells = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return ["| " + " | ".join(str(cell) for cell in row) + " |" for row in cells]


def result_row(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """A result as people read it, its protocol beside the figure."""
    score = next(iter(result["test"]))
    estimate, protocol = result["test"][score], result["protocol"]
    return {
        "run": name,
        "episode": f"{protocol['way']}w {protocol['shot']}s {protocol['query']}q",
        "statistics": protocol["statistics"],
        f"{result.get('split', 'test')} {score}": shown_interval(
            score, estimate["mean"], estimate["ci95"]
        ),
        "protocol": result["protocol_id"],
        "minutes": f"{result['seconds'] / 60:.1f}",
    }
