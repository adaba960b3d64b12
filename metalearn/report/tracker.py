"""Where a run's figures go: console, `metrics.jsonl`, Weights & Biases, and the learning curve as PNG."""

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
from metalearn.report.plots import draw_learning_curve
from metalearn.report.tables import shown
from metalearn.system.atomic import replacing
from metalearn.system.errors import first_line
from metalearn.tasks.metrics import Metric

#: Without a terminal a training row is printed this often at most; every validation is printed.
_QUIET_SECONDS = 15.0


class Tracker:
    """Sends each row of figures to all places; the loop's only listener."""

    def __init__(
        self,
        settings: RunConfig,
        metric: Metric,
        folder: Path,
        console: Console,
        identifier: str,
        step: int,
    ) -> None:
        """identifier: of the run at W&B; step: the step a stopped run goes on from, later rows are cut; -1: a run that begins.

        seconds_before: what the run had taken before it was stopped.
        """
        file = folder / "metrics.jsonl"
        self.rows = [row for row in _read_rows(file) if row["step"] <= step]
        self.seconds_before = float(self.rows[-1].get("seconds", 0.0)) if self.rows else 0.0
        self._start = time.perf_counter()
        self.score = metric.name
        self.folder = folder
        self._console = console
        self._printed = 0.0
        with replacing(file) as stream:
            stream.writelines(_as_line(row).encode() for row in self.rows)
        self._stream = file.open("a", buffering=1)
        self._wandb: Any = None
        if settings.logger.name == "wandb":
            self._start_wandb = functools.partial(
                _start_wandb, settings, folder, console, identifier
            )
            try:
                self._wandb = self._start_wandb()
            except Exception as error:
                self.note(f"W&B: failed ({first_line(error)}); going on without it")
        self._steps = settings.train.steps
        self._progress: Progress | None = None

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Shows progress while meta-training: a live line on a terminal, now and then a line elsewhere."""
        if not self._console.is_terminal:
            yield
            return
        columns = (
            TextColumn("[bold]train"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            self._progress = progress
            self._bar = progress.add_task("train", total=self._steps, figures="")
            yield
        self._progress = None

    def log(self, row: dict[str, Any]) -> None:
        """One row of figures: into the file at once, to W&B, and onto the console."""
        row = row | {"seconds": round(self.seconds_before + time.perf_counter() - self._start, 2)}
        self.rows.append(row)
        self._stream.write(_as_line(row))
        os.fsync(self._stream.fileno())  # a checkpoint must not outlive the rows before it
        self._to_wandb(
            lambda run: run.log({key: row[key] for key in row if key != "step"}, step=row["step"])
        )
        line = self._line(row)
        if self._progress is not None:
            self._progress.update(self._bar, completed=row["step"], figures=line)
        validated = f"val.{self.score}" in row
        due = self._progress is None and time.monotonic() - self._printed > _QUIET_SECONDS
        if validated or due:
            self._console.print(f"step {row['step']:>6}/{self._steps}  {line}", highlight=False)
            self._printed = time.monotonic()

    def _to_wandb(self, send: Callable[[Any], object]) -> None:
        """Sends something to W&B; where that fails, the run goes on offline, and where that fails too, without it."""
        if self._wandb is None:
            return
        try:
            send(self._wandb)
        except Exception as error:  # whatever W&B raises, it is no reason to lose a run
            self.note(f"W&B: failed ({first_line(error)}); going on offline")
            try:
                import wandb

                with contextlib.suppress(Exception):
                    wandb.teardown()  # or else it complains at exit of a service that has died
                self._wandb = self._start_wandb("offline")
                send(self._wandb)
            except Exception as again:
                self.note(f"W&B: offline failed too ({first_line(again)}); going on without it")
                self._wandb = None

    def note(self, line: str) -> None:
        """What the user should know once."""
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _line(self, row: dict[str, Any]) -> str:
        parts = []
        if "tasks_per_second" in row:
            parts.append(f"{row['tasks_per_second']:.0f} tasks/s")
        if "train.loss" in row:
            parts.append(f"loss {row['train.loss']:.4f}")
            if self.score == "accuracy":
                parts.append(f"train {shown(self.score, row['train.accuracy'])}")
        if (value := row.get(f"val.{self.score}")) is not None:
            interval = row[f"val.{self.score}_ci95"]
            parts.append(
                f"[green]val {shown(self.score, value)} ± {shown(self.score, interval)}[/green]"
            )
        return "  ".join(parts)

    def finish(self, result: dict[str, Any], table: Table) -> None:
        """The learning curve, and at W&B the final figures, table and curve."""
        curve = self.folder / "learning_curve.png"
        draw_learning_curve(self.rows, self.score, curve)
        if self._wandb is None:
            return
        import wandb

        estimate = result["test"][self.score]
        summary = {
            f"test.{self.score}": estimate["mean"],
            f"test.{self.score}_ci95": estimate["ci95"],
        }
        summary |= {"protocol_id": result["protocol_id"]}
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
        """Flushes everything; safe to call once at the end of any run."""
        self._stream.close()
        if self._wandb is not None:
            try:
                self._wandb.finish(exit_code=int(failed))
            except Exception as error:
                self.note(f"W&B: failed at the end ({first_line(error)})")


def _as_line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Rows as `Tracker.log` wrote them; a last one that was cut off is left out."""
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            return


def _start_wandb(
    settings: RunConfig, folder: Path, console: Console, identifier: str, mode: str | None = None
) -> Any:
    """A W&B run: online where a key is configured, offline otherwise; never a prompt; said in one line.

    mode: the one to take without asking, after a failure.
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
    except Exception as error:  # settings that it does not know end in errors of all kinds
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
    """In one line, what a run with `logger=wandb` would do."""
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
