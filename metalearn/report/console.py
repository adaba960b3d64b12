"""Open the console that commands print to."""

import sys
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
    """Return the console of a command, at least 160 columns wide if it is not a terminal."""
    stream: Any = Unfailing(sys.stdout)
    console = _Console(file=stream, emoji=False)
    if console.is_terminal:
        return console
    return _Console(file=stream, emoji=False, width=max(console.width, 160))


def print_line(console: Console, line: str) -> None:
    """Print a line without wrapping and without markup, as paths require."""
    console.print(visible(line), highlight=False, soft_wrap=True, markup=False)
