"""Metrics of the steps since the last row, summed on the device."""

import time
from typing import Any

import torch
from torch import Tensor

from metalearn.tasks.types import Params

#: Tensors that a checkpoint has, by their names without the underscore.
_STORED = ("skipped", "first_skipped", "in_a_row")


class Meter:
    """Mean metrics since the last `read`, tasks per second, and the first non-finite step.

    Sums stay on the device until they are read.

    Attributes:
        steps: Number of steps since the last `read`.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums: Params = {}
        self.steps = self._tasks = 0
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        # Step and task, from 0; -1 for none.
        self._first_skipped = torch.full((2,), -1, dtype=torch.int64, device=device)
        self._copy: tuple[int, Tensor, torch.cuda.Event | None] | None = None
        self.restart_clock()

    def add(self, logs: Params, finite: Tensor, step: Tensor, losses: Tensor) -> None:
        """Add the metrics of a step, each [], in place.

        `finite`, bool [], is for loss and gradient; `losses` are those of its tasks, [T].
        """
        for name, value in logs.items():
            counted = torch.where(finite, value, torch.zeros_like(value))
            if name in self._sums:
                self._sums[name].add_(counted)
            else:
                self._sums[name] = counted.clone()
        bad = ~losses.isfinite()
        task = torch.where(bad.any(), bad.to(torch.int64).argmax(), -1)
        is_first = ~finite & (self._skipped == 0)
        first = torch.where(is_first, torch.stack([step, task]), self._first_skipped)
        self._first_skipped.copy_(first)
        self._skipped.add_((~finite).to(torch.int64))
        self._in_a_row.copy_(torch.where(finite, 0, self._in_a_row + 1))

    def count(self, tasks: int) -> None:
        """Count a step with this number of tasks."""
        self.steps += 1
        self._tasks += tasks

    def restart_clock(self) -> None:
        """Measure tasks per second from now on."""
        self._clock = time.perf_counter()

    def skipped(self) -> tuple[int, int, int | None]:
        """Return the number of non-finite steps since the last `read`, and the first one.

        Also its first task with a non-finite loss, from 0; None if every loss is finite.
        """
        step, task = self._first_skipped.tolist()
        return int(self._skipped), step, task if task >= 0 else None

    def skipped_in_a_row(self) -> int:
        """Return the number of consecutive non-finite steps up to now."""
        return int(self._in_a_row)

    def read(self) -> dict[str, float]:
        """Return the metrics of a row, and start the next one."""
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

    def peek(self) -> dict[str, float]:
        """Return the metrics since the last `read` without waiting for the device.

        On a GPU, they are as of an earlier call and were copied since; {} while they are copied.
        """
        if self._copy is None and self._sums:
            values = [*self._sums.values(), self._skipped]
            stacked = torch.stack([value.float() for value in values])
            event = torch.cuda.Event() if stacked.is_cuda else None
            self._copy = self.steps, stacked.to("cpu", non_blocking=True), event
            if event is not None:
                event.record()
        if self._copy is None:
            return {}
        steps, copied, event = self._copy
        if event is not None and not event.query():
            return {}
        self._copy = None
        *means, skipped = copied.tolist()
        counted = steps - skipped
        named = zip(self._sums, means, strict=True)
        return {f"train.{name}": value / counted for name, value in named} if counted else {}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and counts for a checkpoint."""
        own = {name: getattr(self, f"_{name}") for name in _STORED}
        return {"sums": self._sums, "steps": self.steps, **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the sums and counts from a checkpoint, in place."""
        self._sums = {name: value.to(self._skipped.device) for name, value in state["sums"].items()}
        self.steps = state["steps"]
        for name in _STORED:
            getattr(self, f"_{name}").copy_(state[name])
