"""Send a run to Weights & Biases; a failure of W&B never ends the run."""

import contextlib
import dataclasses
import logging
import netrc
import os
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from metalearn.config.fields import given_by_run, setting
from metalearn.config.schema import RunConfig
from metalearn.report.loggers import Example, Logger
from metalearn.report.result import Result
from metalearn.system.atomic import make_folder
from metalearn.system.download import connection_error
from metalearn.system.errors import first_line


@dataclasses.dataclass
class WandbRun(Logger):
    """A run at W&B: after a failure it continues offline, after another one not at all."""

    project: str | None = setting()
    entity: str | None = setting()
    folder: Path = given_by_run()
    identifier: str = given_by_run()
    config: RunConfig = given_by_run()
    note: Callable[[str], None] = given_by_run()

    def __post_init__(self) -> None:
        self._run: Any = None
        try:
            self._run = self._start()
        except Exception as error:
            self.note(f"W&B: failed ({first_line(error)}); continuing without it")

    def log(self, row: dict[str, Any]) -> None:
        values = {key: row[key] for key in row if key != "step"}
        self._send(lambda run: run.log(values, step=row["step"]))

    def log_result(self, result: Result, table: Table, curve: Path) -> None:
        if self._run is None:
            return
        import wandb

        summary = {
            f"test.{result.metric}": result.test.mean,
            f"test.{result.metric}_ci95": result.test.ci95,
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

        self._send(send)

    def log_episode(self, examples: Callable[[], list[Example]]) -> None:
        if self._run is None:
            return
        import wandb

        def cell(content: Any) -> Any:
            if not isinstance(content, Tensor):
                return content
            if content.ndim != 3:
                return str(content.tolist())
            array = (content.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            return wandb.Image(array)

        try:
            data = [[one.part, one.label, cell(one.content), one.predicted] for one in examples()]
        except Exception as error:  # a table must not end a run that is trained and tested
            self.note(f"W&B: no table of an episode ({first_line(error)})")
            return
        if data:
            table = wandb.Table(columns=["part", "class", "input", "predicted"], data=data)
            self._send(lambda run: run.log({"episode": table}))

    def close(self, failed: bool) -> None:
        if self._run is not None:
            try:
                self._run.finish(exit_code=int(failed))
            except Exception as error:
                self.note(f"W&B: failed at the end ({first_line(error)})")

    def _send(self, send: Callable[[Any], object]) -> None:
        """Send something to W&B; after a failure continue offline, after another without W&B."""
        if self._run is None:
            return
        try:
            send(self._run)
        except Exception as error:  # an error of W&B must not end the run
            self.note(f"W&B: failed ({first_line(error)}); continuing offline")
            try:
                _stop_service()  # else it reports its dead service at exit
                self._run = self._start("offline")
                send(self._run)
            except Exception as again:
                self.note(f"W&B: offline failed too ({first_line(again)}); continuing without it")
                self._run = None

    def _start(self, mode: str | None = None) -> Any:
        """Start a W&B run: online if a key is configured, else offline; never prompt.

        `mode` is the mode to use after a failure.
        """
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # the exit waits for its reports
        logging.raiseExceptions = False  # W&B writes a log, also on a full disk
        import wandb

        with _silent_children():
            chosen = wandb.setup().settings
        server, wanted = str(chosen.base_url), mode or str(chosen.mode)
        reason = "" if mode else f"WANDB_MODE={wanted}"
        if wanted == "online" and not os.environ.get("WANDB_MODE") and not _has_key(server):
            wanted, reason = "offline", "no key is configured"
        elif wanted == "online" and (problem := connection_error(server, True, 4.0)):
            # Decided before W&B starts: it would wait longer, and keep the identifier in use.
            wanted, reason = "offline", f"{server} cannot be reached: {problem}"
        make_folder(self.folder / "wandb")

        def start(mode: str) -> Any:
            return wandb.init(
                project=self.project,
                entity=self.entity,
                name="-".join(self.folder.parts[-2:]),
                id=self.identifier,
                resume="allow",
                dir=self.folder.absolute(),  # the service may have another working directory
                mode=mode,  # type: ignore[arg-type]
                config=dataclasses.asdict(self.config),
                settings=wandb.Settings(silent=True, console="off", init_timeout=30),
            )

        try:
            run = start(wanted)
        except Exception as error:  # W&B raises errors of many kinds
            if wanted == "offline":
                raise
            _stop_service()  # in it, the identifier of the run is in use
            wanted, reason = "offline", f"going online failed: {first_line(error)}"
            run = start(wanted)
        if wanted == "online":
            self.note(f"W&B: online, {run.url}")
        elif wanted == "offline" and reason:
            folder = f"{self.folder}/wandb/offline-run-*"
            self.note(f"W&B: offline ({reason}); later: wandb sync {folder}")
        return run


def _stop_service() -> None:
    import wandb

    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()


@contextlib.contextmanager
def _silent_children() -> Iterator[None]:
    """Give processes that are started no output: W&B's service prints its log in some cases."""
    streams = [os.dup(number) for number in (1, 2)]
    with open(os.devnull, "w") as nothing:
        for number in (1, 2):
            os.dup2(nothing.fileno(), number)
    try:
        yield
    finally:
        for number, stream in enumerate(streams, 1):
            os.dup2(stream, number)
            os.close(stream)


def wandb_state() -> str:
    """Return in one line what a run with `logger=wandb` would do."""
    if mode := os.environ.get("WANDB_MODE"):
        return f"WANDB_MODE={mode}"
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return "a key is configured: online" if _has_key(server) else "no key is configured: offline"


def _has_key(server: str) -> bool:
    """Whether a key is configured where W&B looks for one: the environment, or the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    # W&B's cloud has several names; a key for it is stored under the oldest one.
    hosts = {urllib.parse.urlparse(server).hostname, "api.wandb.ai"}
    try:
        return bool(hosts & netrc.netrc(os.environ.get("NETRC")).hosts.keys())
    except (OSError, netrc.NetrcParseError):
        return False
