"""Detect losses and scores that are not finite, save the task for inspection, and end the run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metalearn.report.folder import RunFolder
from metalearn.run.build import Run
from metalearn.run.meter import Meter
from metalearn.system.atomic import atomic_writer, make_folder
from metalearn.system.errors import RunFailed
from metalearn.tasks.types import Batch, Task

#: Number of consecutive non-finite steps from which skipping them is hopeless.
_MAX_SKIPPED_IN_A_ROW = 100
#: Maximum number of tasks with a non-finite loss that a run folder holds.
_MAX_SAVED_TASKS = 10


def check_steps(run: Run, meter: Meter, folder: Path, note: Callable[[str], None]) -> None:
    """Check the steps since the meter was last read.

    The first task with a non-finite loss is saved to `nonfinite/`. Raise RunFailed if a step is not
    finite; with `train.nonfinite=skip`, `note` gets a line.
    """
    skipped, step, task = meter.skipped()
    if not skipped:
        return
    settings = run.config.train
    where = f"step {step + 1}"
    if task is not None:
        where += f", task {task} of {settings.meta_batch}"
        file = RunFolder(folder).nonfinite / f"step{step + 1}-task{task}.pt"
        # The errors of classes have changed since, and so the tasks.
        can_repeat = run.processes.is_leader and run.hard_classes is None
        if can_repeat and _save_task(run.train.draw(step * settings.meta_batch + task, 1), file):
            where += f", saved in {file}"
    line = f"the loss or its gradient is not finite at {where}"
    if settings.nonfinite == "stop":
        raise RunFailed(
            f"{line}; lower train.lr or the inner learning rate, or skip such steps with "
            "train.nonfinite=skip"
        )
    if meter.skipped_in_a_row() >= _MAX_SKIPPED_IN_A_ROW:
        raise RunFailed(
            f"{line}, and {meter.skipped_in_a_row()} consecutive steps were skipped; lower "
            "train.lr or the inner learning rate"
        )
    note(f"{line}: skipped")


def check_scores(run: Run, scores: Tensor, step: int) -> None:
    """Raise RunFailed if a score of a validation, [E], is not finite."""
    bad = (~scores.isfinite()).nonzero()
    if len(bad):
        number = int(bad[0])
        raise RunFailed(
            f"val.{run.metric.name} of validation episode {number} is {scores[number]} at step "
            f"{step}; lower train.lr or the inner learning rate"
        )


def _save_task(task: Task | Batch, file: Path) -> bool:
    """Save one task [1, …], unless the folder is full. Return True if the file exists."""
    make_folder(file.parent)
    if len(list(file.parent.iterdir())) >= _MAX_SAVED_TASKS:
        return file.exists()
    sets: dict[str, Any] = (
        {"batch": task}
        if isinstance(task, Batch)
        else {"support": task.support, "query": task.query}
    )
    parts = {name: {"x": examples.x[0], "y": examples.y[0]} for name, examples in sets.items()}
    with atomic_writer(file) as stream:
        torch.save({**parts, "key": task.key[0]}, stream)
    return True
