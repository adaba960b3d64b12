"""What a finished run leaves: `result.json` with its environment, and the tables people read."""

import dataclasses
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import metalearn
from metalearn.atomic import replacing
from metalearn.errors import leave_unread
from metalearn.figures import shown, shown_interval
from metalearn.stats import Difference
from metalearn.tasks.types import Estimate


class _Console(Console):
    """A console whose reader may leave: a run goes on without it."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        leave_unread(sys.stdout)


def console() -> Console:
    """Where verbs print; without a terminal wide enough that no figure is cut."""
    found = _Console()
    return found if found.is_terminal else _Console(width=max(found.width, 160))


def environment(device: str) -> dict[str, Any]:
    """Commit, versions and hardware: what a figure depends on besides its configuration."""
    import torch

    cuda = torch.device(device).type == "cuda"
    return {
        "commit": _commit(),
        "versions": {
            "metalearn": metalearn.__version__,
            "python": platform.python_version(),
            **{
                name: metadata.version(name)
                for name in ("torch", "torchvision", "hydra-core", "numpy")
            },
        },
        "hardware": torch.cuda.get_device_name()
        if cuda
        else f"{_processor()}, {torch.get_num_threads()} threads",
    }


def _commit() -> str | None:
    """The commit of the checkout this package runs from, with a + when its code or conf/ has changes; None when installed."""
    root = Path(metalearn.__file__).parent.parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():
        return None
    changed = git(
        "status", "--porcelain", "-uno", "--", "metalearn", "conf"
    )  # what a figure depends on
    return f"{git('rev-parse', '--short=10', 'HEAD')}{'+' if changed else ''}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def write_json(path: Path, content: Any) -> None:
    """Readable JSON, written in one go."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with replacing(path) as stream:
        stream.write(text.encode())


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


def print_line(console: Console, line: str) -> None:
    """A line as it is: paths hold no markup and are never wrapped."""
    console.print(line, highlight=False, soft_wrap=True, markup=False)


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
