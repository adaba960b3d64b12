"""What ends in one line and no traceback: a user's mistake (exit code 2), a run that cannot go on (1)."""

import difflib
import os
from collections.abc import Iterable
from typing import TextIO


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean …?" with the nearest known word, or ""."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def first_line(error: Exception) -> str:
    """An exception in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def of_system(error: OSError) -> str:
    """What the system refused, and for which file, in one line."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)


def ran_out(error: BaseException) -> bool:
    """Whether memory did not suffice, on whatever device; torch says so in many ways, mostly as a RuntimeError."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(
            words in str(error)
            for words in (
                "can't allocate memory",
                "not enough memory",
                "bad_alloc",
                "could not create a primitive",
                "out of memory",
                "ALLOC_FAILED",
            )
        )
    )


def leave_unread(stream: TextIO) -> None:
    """For a stream whose reader has left: what is still written to it is lost, and no error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _OneLine(Exception):
    """What it says is one line: characters that would break it, or hide in it, are written as escapes."""

    def __init__(self, line: str) -> None:
        super().__init__(
            "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        )


class RunFailed(_OneLine):
    """A run that cannot go on: one line, exit code 1."""


class UserError(_OneLine):
    """What is wrong, where it was said, what would be right: in one line."""
