"""Write files atomically, and never through a link: a file is complete, or it does not exist."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from metalearn.system.errors import UserError, writing


@contextlib.contextmanager
def atomic_writer(path: Path, previous: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a stream whose content replaces `path` once it is complete and on disk.

    On failure, `path` is unchanged and no temporary file remains: OSError, also where torch.save
    raises a RuntimeError for it. A link is replaced, not followed. The old content moves to
    `previous`, if that is given.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)  # of a killed process of the same number
    try:
        with part.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(part, path)
        sync_folder(path.parent)
    except RuntimeError as error:
        cause = error.__context__
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise cause from None
    finally:
        part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush the folder's entries to disk; otherwise a power cut may undo a rename."""
    if os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems support fsync for files only
            os.fsync(handle)
    finally:
        os.close(handle)


def remove_abandoned(folder: Path, older_than: float = 0.0) -> None:
    """Remove unfinished files of killed processes anywhere below a folder.

    Another process may still write files younger than `older_than`, in seconds.
    """
    for part in folder.rglob(".*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime >= older_than:
                part.unlink()


def make_folder(path: Path) -> None:
    """Make a folder in a folder that exists, unless it exists.

    Raise UserError if it is a link: what is written into a run folder must stay there.
    """
    if path.is_symlink():
        raise UserError(f"{path} is a link; replace it by a folder, as nothing is written through")
    path.mkdir(exist_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; lone surrogates are escaped."""
    with atomic_writer(path) as stream:
        stream.write(text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def make_writable(path: Path) -> None:
    """Create a folder like `make_folder`; raise UserError if it cannot be written."""
    with writing(path):
        make_folder(path)
