"""Losses and scores that are not finite: named, kept for inspection, and the end of the run unless they are to be left out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metalearn.run.build import Run
from metalearn.run.meter import Meter
from metalearn.system.atomic import replacing
from metalearn.system.errors import RunFailed
from metalearn.tasks.types import Batch, Task

#: Steps in a row that are not finite, after which skipping them leads nowhere.
_SKIPPED_IN_A_ROW = 100
#: Tasks with a loss that is not finite that are kept in a run folder at most.
_KEPT_TASKS = 10


def judge_steps(run: Run, meter: Meter, folder: Path, note: Callable[[str], None]) -> None:
    """Looks at the steps since the last reading of the meter; the first task whose loss is not finite goes to `nonfinite/`.

    Raises: RunFailed where a step was not finite, unless such steps are to be skipped: then they are noted.
    """
    skipped, step, task = meter.skipped()
    if not skipped:
        return
    settings = run.config.train
    where = f"step {step + 1}"
    if task is not None:
        where += f", task {task} of {settings.meta_batch}"
        file = folder / "nonfinite" / f"step{step + 1}-task{task}.pt"
        if run.processes.leading and _keep(
            run.train.draw(step * settings.meta_batch + task, 1), file
        ):
            where += f", kept in {file}"
    line = f"the loss or its gradient is not finite at {where}"
    if settings.nonfinite == "stop":
        raise RunFailed(
            f"{line}; lower train.lr or the inner rate, or leave such steps out with train.nonfinite=skip"
        )
    if meter.in_a_row() >= _SKIPPED_IN_A_ROW:
        raise RunFailed(
            f"{line}, and {meter.in_a_row()} steps in a row were not; lower train.lr or the inner rate"
        )
    note(f"{line}: skipped")


def judge_scores(run: Run, scores: Tensor, step: int) -> None:
    """Raises: RunFailed where a score of a validation [E] is not finite; it says which."""
    bad = (~scores.isfinite()).nonzero()
    if len(bad):
        number = int(bad[0])
        raise RunFailed(
            f"val.{run.metric.name} of validation episode {number} is {scores[number]} at step {step}; lower train.lr or the "
            "inner rate"
        )


def _keep(task: Task | Batch, file: Path) -> bool:
    """Writes one task [1, …] down for inspection, unless there are enough already. Returns: whether it is there."""
    file.parent.mkdir(exist_ok=True)
    if len(list(file.parent.iterdir())) >= _KEPT_TASKS:
        return file.exists()
    sets: dict[str, Any] = (
        {"batch": task}
        if isinstance(task, Batch)
        else {"support": task.support, "query": task.query}
    )
    parts = {name: {"x": one.x[0], "y": one.y[0]} for name, one in sets.items()}
    with replacing(file) as stream:
        torch.save({**parts, "key": task.key[0]}, stream)
    return True
