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

from metalearn.system.atomic import atomic_writer, write_json
from metalearn.system.errors import UserError, first_line

#: Version of the format.
_FORMAT = 1
_JSON = "classifier.json"
#: What a folder with other content can raise.
_FAULTS = (
    OSError, ValueError, TypeError, LookupError, AttributeError, EOFError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip


def write(folder: Path, content: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Write a folder; the JSON file is replaced last, and names the arrays that belong to it."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    name = f"arrays-{hashlib.sha256(buffer.getvalue()).hexdigest()[:16]}.npz"
    with atomic_writer(folder / name) as stream:
        stream.write(buffer.getvalue())
    write_json(folder / _JSON, {"format": _FORMAT, **content, "arrays": name})
    for other in folder.glob("arrays-*.npz"):
        if other.name != name:
            other.unlink()


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Read a folder, for a block that uses its content: a fault in it is the folder's.

    Raises:
        UserError: If it is not a saved classifier.
    """
    try:
        content = json.loads((folder / _JSON).read_text())
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']} is of a different version")
        with np.load(folder / Path(content["arrays"]).name, allow_pickle=False) as arrays:
            loaded = {name: arrays[name] for name in arrays.files}
        yield content, loaded
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; {folder} is no classifier") from None
    except _FAULTS as error:
        raise UserError(f"{folder} is not a classifier ({first_line(error)})") from None
