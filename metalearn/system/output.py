"""Prepare standard output and error, so that nothing about them ends a run."""

import codecs
import os
import sys
from typing import Any

from metalearn.system.errors import leave_unread

#: What to write for characters of our output that the terminal's encoding lacks.
_ASCII = {
    "±": "+-", "–": "-", "—": "-", "−": "-", "…": "...", "≤": "<=", "≥": ">=", "×": "x", "→": "->",
}  # fmt: skip


def prepare_streams() -> None:
    """Open closed standard streams, and make them replace characters that they cannot encode."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Gets the lowest free number, this one. Otherwise the next opened file would get it,
            # and whatever a library prints would be written into that file.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115
        if reconfigure := getattr(getattr(sys, name), "reconfigure", None):
            reconfigure(errors="readable")
    sys.stderr = Unfailing(sys.stderr)  # type: ignore[assignment]


def _replacement(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    parts = (_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text)
    return "".join(parts), error.end


codecs.register_error("readable", _replacement)


class Unfailing:
    """A stream that discards its output from the first write that fails: disk full, pipe closed."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text."""
        try:
            self._stream.write(text)
        except OSError:
            leave_unread(self._stream)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self._stream.flush()
        except OSError:
            leave_unread(self._stream)
