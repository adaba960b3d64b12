"""Track a run: console, metrics.jsonl, Weights & Biases, and the learning curve as PNG."""

import contextlib
import dataclasses
import functools
import json
import netrc
import os
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from metalearn.config.schema import RunConfig
from metalearn.report.folder import RunFolder
from metalearn.report.result import Result
from metalearn.report.tables import format_interval, format_value
from metalearn.system.atomic import atomic_writer
from metalearn.system.errors import first_line
from metalearn.tasks.metrics import Metric

#: Without a terminal, seconds between printed training rows; every validation is printed.
_QUIET_SECONDS = 15.0


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
        self.rows = [row for row in _read_rows(file) if row["step"] <= step]
        self.seconds_before = float(self.rows[-1].get("seconds", 0.0)) if self.rows else 0.0
        self._start = time.perf_counter()
        self.score = metric.name
        self._files = files
        self._console = console
        self._printed = 0.0
        with atomic_writer(file) as stream:
            stream.writelines(_as_line(row).encode() for row in self.rows)
        self._stream = file.open("a", buffering=1)
        self._wandb: Any = None
        if settings.logger.name == "wandb":
            self._start_wandb = functools.partial(
                _start_wandb, settings, files.path, console, identifier
            )
            try:
                self._wandb = self._start_wandb()
            except Exception as error:
                self.note(f"W&B: failed ({first_line(error)}); continuing without it")
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
        self._to_wandb(
            lambda run: run.log({key: row[key] for key in row if key != "step"}, step=row["step"])
        )
        line = self._line(row)
        if self._progress is not None:
            self._progress.update(self._bar, completed=row["step"], metrics=line)
        validated = f"val.{self.score}" in row
        due = self._progress is None and time.monotonic() - self._printed > _QUIET_SECONDS
        if validated or due:
            self._console.print(f"step {row['step']:>6}/{self._steps}  {line}", highlight=False)
            self._printed = time.monotonic()

    def _to_wandb(self, send: Callable[[Any], object]) -> None:
        """Send something to W&B; after a failure continue offline, after another without W&B."""
        if self._wandb is None:
            return
        try:
            send(self._wandb)
        except Exception as error:  # an error of W&B must not end the run
            self.note(f"W&B: failed ({first_line(error)}); continuing offline")
            try:
                import wandb

                with contextlib.suppress(Exception):
                    wandb.teardown()  # else it reports its dead service at exit
                self._wandb = self._start_wandb("offline")
                send(self._wandb)
            except Exception as again:
                self.note(f"W&B: offline failed too ({first_line(again)}); continuing without it")
                self._wandb = None

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
        """Send the final result, its table and the learning curve to W&B."""
        curve = self._files.curve
        if self._wandb is None:
            return
        import wandb

        summary = {
            f"test.{self.score}": result.test.mean,
            f"test.{self.score}_ci95": result.test.ci95,
            "protocol_id": result.protocol_id,
        }
        cells = [
            [str(cell) for cell in row]
            for row in zip(*(column.cells for column in table.columns), strict=True)
        ]
        columns: list[str | int] = [str(column.header) for column in table.columns]

        def send(run: Any) -> None:
            run.summary.update(summary)
            run.log(
                {
                    "result": wandb.Table(columns=columns, data=cells),
                    "learning_curve": wandb.Image(str(curve)),
                }
            )

        self._to_wandb(send)

    def close(self, failed: bool = False) -> None:
        """Close the file and the W&B run."""
        self._stream.close()
        if self._wandb is not None:
            try:
                self._wandb.finish(exit_code=int(failed))
            except Exception as error:
                self.note(f"W&B: failed at the end ({first_line(error)})")


def _as_line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows that `Tracker.log` wrote, up to the first incomplete one."""
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            return


def _start_wandb(
    settings: RunConfig, folder: Path, console: Console, identifier: str, mode: str | None = None
) -> Any:
    """Start a W&B run: online if a key is configured, else offline; never prompt.

    Args:
        settings: The configuration.
        folder: The run folder.
        console: Where to print one line about the mode.
        identifier: Identifier of the run at W&B.
        mode: The mode to use after a failure; None: choose.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    wanted = mode or os.environ.get("WANDB_MODE", "online" if _wandb_key() else "offline")

    def start(mode: str) -> Any:
        return wandb.init(
            project=settings.logger.project,
            entity=settings.logger.entity,
            name="-".join(folder.parts[-2:]),
            id=identifier,
            resume="allow",
            dir=folder,
            mode=mode,  # type: ignore[arg-type]
            config=dataclasses.asdict(settings),
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )

    try:
        run = start(wanted)
    except Exception as error:  # W&B raises errors of many kinds
        reason = first_line(error)
        console.print(f"W&B: offline, because going online failed ({reason})", highlight=False)
        return start("offline")
    if wanted == "online":
        console.print(f"W&B: online, {run.url}", highlight=False)
    elif wanted == "offline" and mode is None:
        console.print(
            f"W&B: offline (no key is configured); later: wandb sync {folder}/wandb/offline-run-*",
            highlight=False,
        )
    return run


def wandb_state() -> str:
    """Return in one line what a run with `logger=wandb` would do."""
    if mode := os.environ.get("WANDB_MODE"):
        return f"WANDB_MODE={mode}"
    return "a key is configured: online" if _wandb_key() else "no key is configured: offline"


def _wandb_key() -> bool:
    """Whether a key is configured where W&B looks for one: the environment, or the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
