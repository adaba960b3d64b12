"""The engines of a run: chosen for its tasks, or repeated from the engine.json of another run."""

import dataclasses
from pathlib import Path
from typing import Any

from metalearn.algorithms.base import Algorithm
from metalearn.config.schema import EngineConfig, RunConfig
from metalearn.engine import Engine
from metalearn.system.errors import UserError, prefixed
from metalearn.system.reading import read_json
from metalearn.tasks.types import Batch, Task

#: Engine settings that leave every choice to the engine, or to `engine.choices`.
FREE_CHOICES: dict[str, Any] = {
    "strategy": "auto",
    "task_chunk": 0,
    "threads": 0,
    "convolution": "auto",
}


def make_engines(
    settings: RunConfig,
    algorithm: Algorithm,
    train: Task | Batch,
    test: Task,
    num_processes: int,
    test_batch: int,
    choices: dict[str, Any] | None,
) -> tuple[Engine, Engine]:
    """Return the engines of training and of testing, for tasks of these shapes.

    Processes share a meta-batch; `test_batch` episodes are tested at once. Raise UserError if
    stored choices do not suit the method.
    """
    if choices:
        engines = [Engine(algorithm, **choices[part]) for part in ("train", "test")]
        if engines[0].strategy == "mixed" and engines[0].has_own_loss(train):
            raise UserError(
                "engine.choices: its run used strategy mixed, which does not suit a method with "
                "its own loss"
            )
        return engines[0], engines[1]
    own = settings.engine
    if own.convolution == "direct" and own.precision == "bf16":
        raise UserError("engine.convolution=direct: its kernels need engine.precision=fp32 or tf32")
    engine = Engine(algorithm, own.strategy, own.task_chunk, own.precision, own.convolution)
    # The largest share, so that all processes make the same choice.
    share = -(-settings.train.meta_batch // num_processes)
    return engine.resolve(train, share, True), engine.resolve(test, test_batch, False)


def stored_choices(settings: EngineConfig) -> dict[str, Any] | None:
    """Read the choices of another run's engine from `engine.choices`; None without it.

    Raise UserError if the file is not valid, or if other settings contradict it.
    """
    if settings.choices is None:
        return None
    for name, free in FREE_CHOICES.items():
        if (value := getattr(settings, name)) != free:
            raise UserError(
                f"engine.{name}={value}: engine.choices already sets this; leave one out"
            )
    with prefixed("engine.choices: is not an engine.json of a run"):
        choices = read_choices(Path(settings.choices))
    precision = choices["train"]["precision"]
    if precision != settings.precision:
        raise UserError(
            f"engine.precision={settings.precision}: the run of engine.choices used {precision}"
        )
    return choices


def read_choices(path: Path) -> dict[str, Any]:
    """Read an engine.json; raise UserError if it does not hold valid choices."""
    part = {"strategy": str, "precision": str, "convolution": str, "chunk": int}
    choices = read_json(path, {"threads": int, "train": part, "test": part})
    rules = {field.name: field.metadata for field in dataclasses.fields(EngineConfig)}
    fields = {field.name for field in dataclasses.fields(Engine)} - {"algorithm"}
    is_valid = 0 < choices["threads"] <= 1024
    for own in (choices["train"], choices["test"]):
        is_valid &= own.keys() == fields and 0 < own["chunk"] < 2**31
        for name in ("strategy", "precision", "convolution"):
            is_valid &= own[name] in set(rules[name]["choices"]) - {"auto"}
    if not is_valid:
        raise UserError(f"{path} does not hold the choices of an engine")
    return choices
