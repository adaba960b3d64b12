"""One process at a time in a run folder."""

import contextlib
import errno
import fcntl
from collections.abc import Iterator
from pathlib import Path

from metalearn.system.errors import UserError


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds a lock on a folder, which the system lets go of when the process ends, however it ends.

    Raises: UserError where another process holds it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (
                errno.ENOSYS,
                errno.ENOLCK,
                errno.EOPNOTSUPP,
            ):  # a file system without locks
                yield
                return
            if not isinstance(error, BlockingIOError):
                raise
            raise UserError(
                f"{folder}: another process is writing there; wait for it, or choose another folder"
            ) from None
        yield
