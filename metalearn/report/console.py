"""Open the console that commands print to."""

import os
import sys

from rich.console import Console

from metalearn.system.errors import leave_unread


class _Console(Console):
    """A console that becomes silent if its reader closes the pipe, so that the run continues."""

    def on_broken_pipe(self) -> None:
        """Discard all further output."""
        self.quiet = True
        leave_unread(sys.stdout)


def open_console() -> Console:
    """Return the console of a command, at least 160 columns wide if it is not a terminal.

    A notebook's cell is no terminal: it shows the codes that move a cursor.
    """
    console = _Console(force_terminal=False if "JPY_PARENT_PID" in os.environ else None)
    return (
        console
        if console.is_terminal
        else _Console(width=max(console.width, 160), force_terminal=False)
    )


def print_line(console: Console, line: str) -> None:
    """Print a line without markup, wrapped between words on a terminal; a path is never broken."""
    if console.is_terminal:
        console.print(line, highlight=False, markup=False, overflow="ignore", crop=False)
    else:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
