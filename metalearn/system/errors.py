"""Define the errors that end a command with one line: a user's mistake (2), a failed run (1)."""

import contextlib
import difflib
import os
import re
from collections.abc import Iterable, Iterator
from typing import TextIO

_NO_MEMORY = re.compile(
    "can't allocate memory|not enough memory|bad_alloc|could not create a primitive|out of memory|"
    "ALLOC_FAILED|calculation overflowed"
)


def nearest(word: str, known: Iterable[str], similarity: float = 0.5) -> str:
    """Return "; did you mean …?" with the nearest known word, at least so similar, or ""."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=similarity)
    return f"; did you mean {close[0]}?" if close else ""


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or its class name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def describe_os_error(error: OSError) -> str:
    """Return the file name and the reason of an operating-system error, in one line."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if memory did not suffice, on any device.

    torch has many messages for this, and most are a RuntimeError.
    """
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))
    )


def visible(text: str) -> str:
    """Return text with non-printable characters escaped, so that none acts on a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, length: int) -> str:
    """Return text of at most this many characters, which ends with … if more are left out."""
    return text if len(text) <= length else text[: length - 1] + "…"


def leave_unread(stream: TextIO) -> None:
    """Discard further output to a stream that cannot be written any more, without an error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _OneLine(Exception):
    """A message in one line: non-printable characters are escaped."""

    def __init__(self, line: str) -> None:
        super().__init__(visible(line))


class RunFailed(_OneLine):
    """A run that cannot continue: one line, exit code 1."""


class UserError(_OneLine):
    """A user's mistake in one line: what is wrong, where it was set, what would be right."""


@contextlib.contextmanager
def writing(name: object, hint: str = "") -> Iterator[None]:
    """Raise UserError if something of this name cannot be written; `hint` ends the message."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{name} cannot be written ({error.strerror}){hint}") from None


@contextlib.contextmanager
def prefixed(where: object) -> Iterator[None]:
    """Begin the message of a UserError with where it was raised."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def as_failure(error: Exception) -> Exception:
    """Return the error, as RunFailed if memory, the disk or a file was the cause."""
    if is_out_of_memory(error):
        return RunFailed(
            "out of memory outside of a step; try smaller images (dataset.image_size), fewer "
            "filters or episodes"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return RunFailed(describe_os_error(error))
    return error


def exit_code(error: Exception) -> int | None:
    """Return 2 for a user's mistake, 1 for a run that cannot continue, None for a bug."""
    return 2 if isinstance(error, UserError) else 1 if isinstance(error, RunFailed) else None
