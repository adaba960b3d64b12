"""The folder of a saved classifier: one JSON file, and the arrays that it names, without pickle."""

import contextlib
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from metalearn.config import paths
from metalearn.report.folder import RunFolder
from metalearn.system.atomic import atomic_writer, sync_folder, write_json, write_text
from metalearn.system.errors import UserError, first_line
from metalearn.system.reading import read_yaml

#: Version of the format.
_FORMAT = 1
JSON = "classifier.json"
#: What a folder with other content can raise.
_FAULTS = (
    OSError, ValueError, TypeError, LookupError, AttributeError, EOFError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip


def write(folder: Path, content: dict[str, Any], arrays: dict[str, Any], name: str = JSON) -> None:
    """Write a folder; the JSON file is replaced last, and names the arrays that belong to it."""
    folder.mkdir(parents=True, exist_ok=True)
    sync_folder(folder.parent)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    file = f"arrays-{hashlib.sha256(buffer.getvalue()).hexdigest()[:16]}.npz"
    with atomic_writer(folder / file) as stream:
        stream.write(buffer.getvalue())
    write_json(folder / name, {"format": _FORMAT, **content, "arrays": file})
    for other in folder.glob("arrays-*.npz"):
        if other.name != file:
            other.unlink()


def copy_run(run: Path, folder: Path, identity: str) -> str:
    """Copy what predictions need of a run: its settings, without paths, and its best checkpoint.

    `identity` is the hash of the checkpoint. Return the name of the copy in the folder.
    """
    source, copy = RunFolder(run), RunFolder(folder / f"run-{identity[:16]}")
    if not copy.config.exists():
        copy.best.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(copy.best) as stream:
            stream.write(source.best.read_bytes())
        settings = read_yaml(source.config)
        for key in paths.PATHS:
            group, _, name = key.rpartition(".")
            own = settings.get(group, {}) if group else settings
            if isinstance(own.get(name), str):
                own[name] = Path(own[name]).name
        write_text(copy.config, yaml.safe_dump(settings))
    return copy.path.name


@contextlib.contextmanager
def reading(
    folder: Path, name: str = JSON
) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Read a folder, for a block that uses its content: a fault in it is the folder's.

    Raise UserError if it is not a saved classifier.
    """
    try:
        content = json.loads((folder / name).read_text())
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']} is of a different version")
        with np.load(folder / Path(content["arrays"]).name, allow_pickle=False) as arrays:
            loaded = {key: arrays[key] for key in arrays.files}
        yield content, loaded
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; {folder} is no classifier") from None
    except _FAULTS as error:
        raise UserError(f"{folder} is not a classifier ({first_line(error)})") from None
