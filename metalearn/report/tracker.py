"""Track a run: console, metrics.jsonl, Weights & Biases, and the learning curve as PNG."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from metalearn.config.schema import RunConfig
from metalearn.report.console import print_line
from metalearn.report.folder import RunFolder
from metalearn.report.plots import draw_learning_curve
from metalearn.report.progress import Listener, Probe, Progress
from metalearn.report.result import Result
from metalearn.report.wandb_run import WandbRun
from metalearn.system.atomic import atomic_writer
from metalearn.tasks.metrics import Metric


class Tracker(Listener):
    """Send each row of metrics to the console, to metrics.jsonl and to W&B.

    Args:
        settings: The configuration.
        metric: What validation and test report.
        files: The run folder.
        console: Where to print.
        identifier: Identifier of the run at W&B.
        step: The step to resume from, later rows are removed; -1: a new run.
        first_lines: Lines to print with the time that the run will take, once it is known.

    Attributes:
        rows: All rows so far.
        progress: The progress display.
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
        first_lines: list[str],
    ) -> None:
        file = files.metrics
        self.rows = [row for row in _read_rows(file) if row["step"] <= step]
        self.seconds_before = float(self.rows[-1].get("seconds", 0.0)) if self.rows else 0.0
        self._start = time.perf_counter()
        self.score = metric.name
        self._files = files
        self._console = console
        self.progress = Progress(
            settings, metric.name, console, first_lines, max(0, step), self.seconds_before
        )
        with atomic_writer(file) as stream:
            stream.writelines(_as_line(row).encode() for row in self.rows)
        self._stream = file.open("a", buffering=1)
        self._wandb = (
            WandbRun(settings, files.path, identifier, self.note)
            if settings.logger.name == "wandb"
            else None
        )

    def begin(self, probe: Probe) -> None:
        """Training begins."""
        self.progress.begin(probe)

    def step(self, step: int) -> None:
        """Count a step."""
        self.progress.step(step)

    def episodes(self, phase: str, done: int, total: int) -> None:
        """Count evaluated episodes."""
        self.progress.episodes(phase, done, total)

    def embedding(self, done: int, total: int) -> None:
        """Count embedded inputs."""
        self.progress.embedding(done, total)

    def log(self, row: dict[str, Any]) -> None:
        """Log one row of metrics."""
        row = row | {"seconds": round(self.seconds_before + time.perf_counter() - self._start, 2)}
        self.rows.append(row)
        self._stream.write(_as_line(row))
        os.fsync(self._stream.fileno())  # a checkpoint must not outlive the rows before it
        if self._wandb:
            self._wandb.log(row)
        self.progress.row(row)

    def note(self, line: str) -> None:
        """Print a line for the user."""
        print_line(self._console, line)

    def finish(self, result: Result, table: Table) -> None:
        """Draw the learning curve, and send the final result, table and curve to W&B."""
        curve = self._files.curve
        draw_learning_curve(self.rows, self.score, curve)
        if self._wandb:
            self._wandb.log_result(result, table, curve)

    def close(self, failed: bool = False) -> None:
        """Close the file and the W&B run."""
        self.progress.announce()
        self._stream.close()
        if self._wandb:
            self._wandb.close(failed)


def _as_line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows that `Tracker.log` wrote, up to the first incomplete one."""
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            return
