"""Let one process at a time write to a run folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from metalearn.system.errors import UserError


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; the system releases it when the process ends.

    Raise UserError if another process holds it, or .lock is a link, which would be written through.
    """
    lock = folder / ".lock"
    if lock.is_symlink():
        raise UserError(f"{lock} is a link; remove it")
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise UserError(
            f"{folder}: another process is writing there; wait for it, or choose another folder"
        ) from None


def is_in_use(folder: Path) -> bool:
    """Return True if another process holds the lock of a folder."""
    if not (folder / ".lock").exists():
        return False
    try:
        with alone_in(folder):
            return False
    except UserError:
        return True
