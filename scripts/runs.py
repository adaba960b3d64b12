"""Train in a folder of a benchmark: once, and again if the settings have changed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from metalearn.cli._arguments import take_plugins
from metalearn.config import checking, composition, roles
from metalearn.report.folder import RunFolder
from metalearn.system.errors import UserError


def make_room(folder: Path, overrides: list[str]) -> None:
    """Delete a run whose training or test settings differ from these overrides.

    A run that this version cannot read is deleted too. A matching run, finished or interrupted,
    remains, so that `resume=auto` continues it.
    """
    if not RunFolder(folder).is_started:
        return
    config = checking.check_config(composition.compose_config(take_plugins(overrides)))
    expected: Any = OmegaConf.create(checking.plain(config))
    content: Any = OmegaConf.to_container(expected)
    all_roles = roles.roles(content)
    try:
        stored: Any = composition.load_config(folder)
    except UserError:
        shutil.rmtree(folder)
        return
    for key in {*checking.leaves(expected), *checking.leaves(stored)}:
        key_roles = roles.role_of(key, all_roles)[0]
        if key_roles & {"identity", "protocol", "seed"} and OmegaConf.select(
            expected, key
        ) != OmegaConf.select(stored, key):
            shutil.rmtree(folder)
            return


def run(folder: Path, overrides: list[str], more: list[str]) -> dict[str, Any]:
    """Return the result of the run in this folder; run it first unless it is finished."""
    make_room(folder, [*overrides, *more])
    if not RunFolder(folder).is_finished:
        words = [*overrides, "logger=none", "resume=auto", *more, f"hydra.run.dir={folder}"]
        command = [sys.executable, "-m", "metalearn", "train", *words]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".log").open("a") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)
    result: dict[str, Any] = json.loads(RunFolder(folder).result.read_text())
    return result
