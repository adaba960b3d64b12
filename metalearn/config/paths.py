"""Take paths as the shell passes them: any characters, `~`, relative to the working directory."""

import os
import re
from pathlib import Path
from typing import Any

from metalearn.config.composition import quoted

#: Settings that hold a path.
PATHS = frozenset(
    ("dataset.path", "dataset.split", "hydra.run.dir", "hydra.sweep.dir", "data_dir", "cache_dir",
     "backbone.weights", "engine.choices", "train.start", "dataset.clusters_of")
)  # fmt: skip
#: Values that keep Hydra's meaning: null, a quoted text, an interpolation.
_OWN_MEANING = re.compile(r"""null|'.*'|".*"|.*\$\{.*""", re.DOTALL)
_FUNCTION = re.compile(r"[a-z_]+\(.*\)", re.DOTALL)


def literal(override: str, is_multirun: bool) -> str:
    """Quote the path in `key=value`, so that Hydra reads it as it is, if the setting holds one.

    In a multirun, commas separate several values, and functions like glob(*) exist.
    """
    key, _, value = override.partition("=")
    if key.lstrip("+") not in PATHS or not value or (is_multirun and _FUNCTION.fullmatch(value)):
        return override
    paths = [
        path if _OWN_MEANING.fullmatch(path) else quoted(os.path.expanduser(path))
        for path in (value.split(",") if is_multirun else [value])
    ]
    return f"{key}={','.join(paths)}"


def make_absolute(config: Any, overrides: list[str], data_dir: Path) -> None:
    """Make `dataset.path` absolute, in place, if the command gave it.

    It is relative to the working directory or, if nothing is there, to the data directory. A path
    that exists in neither stays as it is, for the dataset to report.
    """
    if not any(word.lstrip("+").startswith("dataset.path=") for word in overrides):
        return
    path = config.dataset.path
    for folder in (Path.cwd(), data_dir):
        if (folder / path).exists():
            config.dataset.path = str(folder / path)
            return
