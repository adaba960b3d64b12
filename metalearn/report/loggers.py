"""Send the metrics of a run to other places than its folder; `wandb_run` has the one for W&B."""

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from metalearn.config.fields import given_by_run
from metalearn.report.result import Result
from metalearn.system.atomic import make_folder
from metalearn.system.errors import UserError


class Example(NamedTuple):
    """An example of an episode and its prediction.

    Attributes:
        part: "support" or "query".
        label: Name of its class.
        predicted: Name of the predicted class; "" for a support example.
        content: An image as it is shown, float [C, H, W] in [0, 1], a text, or a vector.
    """

    part: str
    label: str
    predicted: str
    content: Any


class Logger:
    """Receives the metrics of one run, and discards what a subclass does not use.

    A logger is a dataclass. `conf/logger/<name>.yaml` has its settings; it can declare these fields
    with `given_by_run`: `folder`, the run folder; `identifier` of the run; `config`, a RunConfig;
    `rows`, those before an interruption; `note`, which prints a line.
    """

    def log(self, row: dict[str, Any]) -> None:
        """Receive a row: `step` and its metrics."""

    def log_result(self, result: Result, table: Table, curve: Path) -> None:
        """Receive the final result, its table, and the learning curve as PNG."""

    def log_episode(self, examples: Callable[[], list[Example]]) -> None:
        """Receive the first test episode; `examples` computes it, [] for tasks without classes."""

    def close(self, failed: bool) -> None:
        """End the run."""


@dataclasses.dataclass
class Csv(Logger):
    """Writes metrics.csv; a metric that a row lacks is an empty cell."""

    folder: Path = given_by_run()
    rows: list[dict[str, Any]] = given_by_run()

    def __post_init__(self) -> None:
        self.rows = [*self.rows]
        self._write()

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if row.keys() <= set(self._columns):
            with (self.folder / "metrics.csv").open("a", newline="") as stream:
                csv.DictWriter(stream, self._columns).writerow(row)
        else:
            self._write()

    def _write(self) -> None:
        self._columns = list(dict.fromkeys(key for row in self.rows for key in row)) or ["step"]
        with (self.folder / "metrics.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, self._columns)
            writer.writeheader()
            writer.writerows(self.rows)


@dataclasses.dataclass
class TensorBoard(Logger):
    """Writes event files to the folder `tensorboard`; raises UserError if it is not installed."""

    folder: Path = given_by_run()
    rows: list[dict[str, Any]] = given_by_run()

    def __post_init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "logger=tensorboard: is not installed; install metalearn-lab[tensorboard]"
            ) from None
        folder = self.folder / "tensorboard"
        make_folder(folder)
        # Steps after those that were kept are computed again.
        purge = self.rows[-1]["step"] + 1 if self.rows else 0
        self._writer = SummaryWriter(folder, purge_step=purge)  # type: ignore[no-untyped-call]

    def log(self, row: dict[str, Any]) -> None:
        for name in row.keys() - {"step"}:
            self._writer.add_scalar(name.replace(".", "/"), row[name], row["step"])  # type: ignore[no-untyped-call]

    def log_result(self, result: Result, table: Table, curve: Path) -> None:
        self._writer.add_scalar(f"test/{result.metric}", result.test.mean)  # type: ignore[no-untyped-call]
        cells = list(zip(*(column.cells for column in table.columns), strict=True))
        header = [str(column.header) for column in table.columns]
        lines = ["|".join(map(str, row)) for row in (header, ["-"] * len(header), *cells)]
        self._writer.add_text("result", "\n".join(lines))  # type: ignore[no-untyped-call]

    def close(self, failed: bool) -> None:
        self._writer.close()  # type: ignore[no-untyped-call]
