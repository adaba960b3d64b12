"""Files that are whole or not there."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def replacing(path: Path, previous: Path | None = None) -> Iterator[IO[bytes]]:
    """A stream whose content takes the place of `path` once it is complete and on disk; nothing is left on failure.

    Args: previous: where what `path` held goes.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(part, path)
        _sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Puts names on disk too: without it a rename may be undone by a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems have it for files alone
            os.fsync(handle)
    finally:
        os.close(handle)


def remove_abandoned(folder: Path, older_than: float = 0.0) -> None:
    """Removes the unfinished files that killed processes have left anywhere below a folder.

    Args: older_than: seconds; younger ones may still be written, unless it is known that nobody writes.
    """
    for part in folder.rglob(".*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime >= older_than:
                part.unlink()


def write_json(path: Path, content: Any) -> None:
    """Readable JSON, written in one go."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with replacing(path) as stream:
        stream.write(text.encode())
