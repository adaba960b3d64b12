"""Where commands print."""

import sys

from rich.console import Console

from metalearn.system.errors import leave_unread


class _Console(Console):
    """A console whose reader may leave: a run goes on without it."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        leave_unread(sys.stdout)


def open_console() -> Console:
    """Where verbs print; without a terminal wide enough that no figure is cut."""
    found = _Console()
    return found if found.is_terminal else _Console(width=max(found.width, 160))


def print_line(console: Console, line: str) -> None:
    """A line as it is: paths hold no markup and are never wrapped."""
    console.print(line, highlight=False, soft_wrap=True, markup=False)
