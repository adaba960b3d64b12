"""Track a run: console, metrics.jsonl, Weights & Biases, and the learning curve as PNG."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from metalearn.config.schema import RunConfig
from metalearn.report.folder import RunFolder
from metalearn.report.plots import draw_learning_curve
from metalearn.report.result import Result
from metalearn.report.tables import format_interval, format_value
from metalearn.report.wandb_run import WandbRun
from metalearn.system.atomic import atomic_writer
from metalearn.system.reading import check_types, parse_json, read_text
from metalearn.tasks.metrics import Metric

#: Without a terminal, seconds between printed training rows; every validation is printed.
_QUIET_SECONDS = 15.0
#: Largest metrics.jsonl that is read, in bytes: millions of rows.
_MAX_BYTES = 1 << 30


class Tracker:
    """Send each row of metrics to the console, to metrics.jsonl and to W&B.

    Args:
        settings: The configuration.
        metric: What validation and test report.
        files: The run folder.
        console: Where to print.
        identifier: Identifier of the run at W&B.
        step: The step to resume from, later rows are removed; -1: a new run.

    Attributes:
        rows: All rows so far.
        seconds_before: Seconds that the run had taken before it was interrupted.
    """

    def __init__(
        self,
        settings: RunConfig,
        metric: Metric,
        files: RunFolder,
        console: Console,
        identifier: str,
        step: int,
    ) -> None:
        file = files.metrics
        self.rows = [row for row in _read_rows(file) if row["step"] <= step] if step >= 0 else []
        self.seconds_before = float(self.rows[-1].get("seconds", 0.0)) if self.rows else 0.0
        self._start = time.perf_counter()
        self.score = metric.name
        self._files = files
        self._console = console
        self._printed = 0.0
        with atomic_writer(file) as stream:
            stream.writelines(_as_line(row).encode() for row in self.rows)
        self._stream = file.open("a", buffering=1)
        self._wandb = (
            WandbRun(settings, files.path, identifier, self.note)
            if settings.logger.name == "wandb"
            else None
        )
        self._steps = settings.train.steps
        self._progress: Progress | None = None

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Show progress during meta-training, with a live line on a terminal."""
        if not self._console.is_terminal:
            yield
            return
        columns = (
            TextColumn("[bold]train"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            self._progress = progress
            self._bar = progress.add_task("train", total=self._steps, metrics="")
            yield
        self._progress = None

    def log(self, row: dict[str, Any]) -> None:
        """Log one row of metrics."""
        row = row | {"seconds": round(self.seconds_before + time.perf_counter() - self._start, 2)}
        self.rows.append(row)
        self._stream.write(_as_line(row))
        os.fsync(self._stream.fileno())  # a checkpoint must not outlive the rows before it
        if self._wandb:
            self._wandb.log(row)
        line = self._line(row)
        if self._progress is not None:
            self._progress.update(self._bar, completed=row["step"], metrics=line)
        validated = f"val.{self.score}" in row
        due = self._progress is None and time.monotonic() - self._printed > _QUIET_SECONDS
        if validated or due:
            self._console.print(f"step {row['step']:>6}/{self._steps}  {line}", highlight=False)
            self._printed = time.monotonic()

    def note(self, line: str) -> None:
        """Print a line for the user."""
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _line(self, row: dict[str, Any]) -> str:
        parts = []
        if "tasks_per_second" in row:
            parts.append(f"{row['tasks_per_second']:.0f} tasks/s")
        if "train.loss" in row:
            parts.append(f"loss {row['train.loss']:.4f}")
            if self.score == "accuracy":
                parts.append(f"train {format_value(self.score, row['train.accuracy'])}")
        if (value := row.get(f"val.{self.score}")) is not None:
            text = format_interval(self.score, value, row[f"val.{self.score}_ci95"])
            parts.append(f"[green]val {text}[/green]")
        return "  ".join(parts)

    def finish(self, result: Result, table: Table) -> None:
        """Draw the learning curve, and send the final result, table and curve to W&B."""
        curve = self._files.curve
        draw_learning_curve(self.rows, self.score, curve)
        if self._wandb:
            self._wandb.log_result(result, table, curve)

    def close(self, failed: bool = False) -> None:
        """Close the file and the W&B run."""
        with contextlib.suppress(OSError):  # the disk is full; every row was flushed when logged
            self._stream.close()
        if self._wandb:
            self._wandb.close(failed)


def _as_line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows that `Tracker.log` wrote, up to the first incomplete one."""
    for line in read_text(file, _MAX_BYTES).splitlines() if file.exists() else []:
        try:
            row = parse_json(line)
            check_types(row, {"step": int})
        except ValueError:
            return
        if not all(isinstance(value, int | float) for value in row.values()):
            return
        yield row
