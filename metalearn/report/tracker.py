"""Track a run: console, metrics.jsonl, and the loggers of the configuration."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from metalearn.config import components
from metalearn.config.schema import RunConfig
from metalearn.report.console import print_line
from metalearn.report.folder import RunFolder
from metalearn.report.loggers import Example, Logger
from metalearn.report.progress import Progress
from metalearn.report.result import Result
from metalearn.system.atomic import atomic_writer
from metalearn.system.reading import check_types, parse_json, read_text
from metalearn.tasks.metrics import Metric

#: Largest metrics.jsonl that is read, in bytes: millions of rows.
_MAX_BYTES = 1 << 30


class Tracker(Progress):
    """A progress display that also writes each row to metrics.jsonl and to the loggers.

    `step` is the one to resume from, later rows are removed; -1: a new run. `first_lines` are
    printed with the time that the run will take, once it is known.

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
        first_lines: list[str],
    ) -> None:
        file = files.metrics
        self.rows = [row for row in read_rows(file) if row["step"] <= step] if step >= 0 else []
        self.seconds_before = float(self.rows[-1].get("seconds", 0.0)) if self.rows else 0.0
        super().__init__(
            settings, metric.name, console, first_lines, max(0, step), self.seconds_before
        )
        self._start = time.perf_counter()
        self._files = files
        with atomic_writer(file) as stream:
            stream.writelines(_as_line(row).encode() for row in self.rows)
        self._stream = file.open("a", buffering=1)
        self._loggers: list[Logger] = [
            components.make(
                own, f"logger.{name}",
                config=settings, folder=files.path, identifier=identifier, rows=self.rows,
                note=self.note,
            )
            for name, own in settings.logger.items()
        ]  # fmt: skip

    def log(self, row: dict[str, Any]) -> None:
        row = row | {"seconds": round(self.seconds_before + time.perf_counter() - self._start, 2)}
        self.rows.append(row)
        self._stream.write(_as_line(row))
        os.fsync(self._stream.fileno())  # a checkpoint must not outlive the rows before it
        for logger in self._loggers:
            logger.log(row)
        super().log(row)

    def note(self, line: str) -> None:
        print_line(self._console, line)

    def finish(self, result: Result, table: Table, examples: Callable[[], list[Example]]) -> None:
        """Send the result, its table, the learning curve and an episode to the loggers."""
        for logger in self._loggers:
            logger.log_result(result, table, self._files.curve)
            logger.log_episode(examples)

    def close(self, failed: bool = False) -> None:
        """Close the file and the loggers."""
        self.announce()
        with contextlib.suppress(OSError):  # the disk is full; every row was flushed when logged
            self._stream.close()
        for logger in self._loggers:
            logger.close(failed)


def _as_line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
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
