"""What a run folder holds, and whether a command may resume it."""

import dataclasses
import uuid
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from metalearn.config import checking, composition, roles
from metalearn.config.schema import COMPONENTS, RunConfig
from metalearn.report.folder import RunFolder
from metalearn.run.engines import FREE_CHOICES, read_choices
from metalearn.system.atomic import write_json
from metalearn.system.errors import UserError
from metalearn.system.lock import is_in_use


def config_to_resume(files: RunFolder, settings: RunConfig) -> DictConfig | None:
    """Return the configuration of the run in the folder, if it should be resumed, or UserError."""
    if not files.is_started:
        return None
    folder = files.path
    if is_in_use(folder):
        raise UserError(
            f"{folder}: another process is training this run; wait for it, or choose another "
            "hydra.run.dir"
        )
    if settings.resume != "auto":
        state = "finished run; resume=auto shows it again"
        if not files.is_finished:
            state = "stopped run; resume=auto resumes it"
        raise UserError(f"{folder} holds a {state}, another hydra.run.dir keeps it")
    current = checking.plain(settings)
    stored = composition.load_config(folder)
    before, now = checking.leaves(stored), checking.leaves(current)
    described = roles.roles(current)
    keys = sorted({**before, **now}, key=lambda key: key.partition(".")[0] not in COMPONENTS)
    for key in keys:
        if before.get(key) != now.get(key) and not roles.may_resume_with(key, described):
            raise UserError(
                f"{folder} holds a run with {key}={before.get(key)}, not {now.get(key)}; resume it "
                f"unchanged (metalearn resume {folder}), or choose another hydra.run.dir"
            )
    return stored


def with_stored_choices(settings: RunConfig, files: RunFolder, before: DictConfig) -> RunConfig:
    """Return settings that repeat the engine's choices before the interruption.

    A different `engine.task_chunk` in the command replaces them.
    """
    engine = settings.engine
    if files.engine.exists() and before.engine.task_chunk == engine.task_chunk:
        engine = dataclasses.replace(engine, **FREE_CHOICES, choices=str(files.engine))
    return dataclasses.replace(settings, engine=engine)


def check_choices(files: RunFolder, choices: dict[str, Any]) -> None:
    """Check the device and the number of processes: with others, results round differently."""
    before = read_choices(files.engine)
    for name in ("device", "processes"):
        if name in before and before[name] != choices[name]:
            raise UserError(
                f"{files.path}: this run has {name}={before[name]}, here it is {choices[name]}; "
                "resume it unchanged"
            )


def save_command(files: RunFolder, name: str, overrides: list[str]) -> dict[str, Any]:
    """Save the command and working directory, unless the run has started; return command.json."""
    stored = files.read_command() if files.command.exists() else {}
    command = {"id": uuid.uuid4().hex[:8], **stored}
    if not stored or not files.is_started:
        command |= {"name": name, "overrides": overrides, "directory": str(Path.cwd())}
        write_json(files.command, command)
    return command
