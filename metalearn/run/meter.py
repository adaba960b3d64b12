"""What has been seen since the last row of metrics, summed on the device."""

import time
from typing import Any

import torch
from torch import Tensor

from metalearn.tasks.types import Params


class Meter:
    """Means since the last reading, summed on the device and fetched when read; tasks a second; the first step since then
    whose loss or gradient was not finite.

    steps: taken since the last reading.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums: Params = {}
        self.steps = self._tasks = 0
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._first_skipped = torch.full(
            (2,), -1, dtype=torch.int64, device=device
        )  # step and task, from 0
        self.restart_clock()

    def add(self, logs: Params, finite: Tensor, step: Tensor, losses: Tensor) -> None:
        """What a step says, into the sums where they lie.

        Args: finite: [] bool; step: [] its number from 0; losses: of its tasks, [T].
        """
        for name, value in logs.items():
            counted = torch.where(finite, value, torch.zeros_like(value))
            if name in self._sums:
                self._sums[name].add_(counted)
            else:
                self._sums[name] = counted.clone()
        bad = ~losses.isfinite()
        task = torch.where(bad.any(), bad.to(torch.int64).argmax(), -1)
        new = ~finite & (self._skipped == 0)
        self._first_skipped.copy_(torch.where(new, torch.stack([step, task]), self._first_skipped))
        self._skipped.add_((~finite).to(torch.int64))
        self._in_a_row.copy_(torch.where(finite, 0, self._in_a_row + 1))

    def count(self, tasks: int) -> None:
        """A step with so many tasks is done."""
        self.steps += 1
        self._tasks += tasks

    def restart_clock(self) -> None:
        self._clock = time.perf_counter()

    def skipped(self) -> tuple[int, int, int | None]:
        """How many steps were not finite, the first of them, and its first task whose loss was not (from 0)."""
        step, task = self._first_skipped.tolist()
        return int(self._skipped), step, task if task >= 0 else None

    def in_a_row(self) -> int:
        """How many steps up to now were not finite, one after the other."""
        return int(self._in_a_row)

    def read(self) -> dict[str, float]:
        """The figures of a row; then all begins anew."""
        skipped = int(self._skipped)
        counted = self.steps - skipped
        row = (
            {f"train.{name}": value.item() / counted for name, value in self._sums.items()}
            if counted
            else {}
        )
        if skipped:
            row["train.skipped"] = skipped
        for value in (*self._sums.values(), self._skipped):
            value.zero_()
        now = time.perf_counter()
        row["tasks_per_second"] = self._tasks / (now - self._clock)
        self._clock, self.steps, self._tasks = now, 0, 0
        return row

    def kept(self) -> dict[str, Any]:
        return {
            "sums": self._sums,
            "steps": self.steps,
            "skipped": self._skipped,
            "first_skipped": self._first_skipped,
            "in_a_row": self._in_a_row,
        }

    def restore(self, kept: dict[str, Any]) -> None:
        self._sums = {name: value.to(self._skipped.device) for name, value in kept["sums"].items()}
        self.steps = kept["steps"]
        self._skipped.copy_(kept["skipped"])
        self._first_skipped.copy_(kept["first_skipped"])
        self._in_a_row.copy_(kept["in_a_row"])
