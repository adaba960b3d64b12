"""Open the console that commands print to."""

import os
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.text import Text

from metalearn.system.errors import visible
from metalearn.system.output import Unfailing


class _Console(Console):
    """A console on which foreign text has no effect, and whose failing output ends no run."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape non-printable characters, and replace those that the encoding lacks."""
        lines = "\n".join(map(visible, text.split("\n")))
        shown = lines.encode(self.encoding, "readable").decode(self.encoding)
        return super().render_str(shown, **options)


def open_console() -> Console:
    """Return the console of a command, at least 160 columns wide if it is not a terminal.

    A notebook's cell is no terminal: it shows the codes that move a cursor.
    """
    stream: Any = Unfailing(sys.stdout)
    is_notebook = "JPY_PARENT_PID" in os.environ
    console = _Console(file=stream, emoji=False, force_terminal=False if is_notebook else None)
    if console.is_terminal:
        return console
    return _Console(file=stream, emoji=False, width=max(console.width, 160), force_terminal=False)


def print_lines(console: Console, lines: Iterable[object], indent: str = "") -> None:
    """Print lines without markup, wrapped between words on a terminal; a path is never broken."""
    wrapping: Any = {"overflow": "ignore", "crop": False}
    if not console.is_terminal:
        wrapping = {"soft_wrap": True}
    for line in lines:
        console.print(visible(f"{indent}{line}"), highlight=False, markup=False, **wrapping)


def print_line(console: Console, line: str) -> None:
    """Print a line as `print_lines` does."""
    print_lines(console, [line])
