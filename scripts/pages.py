"""Insert generated text into Markdown pages, between a pair of HTML comments."""

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent


def wrap(lines: list[str]) -> list[str]:
    """Wrap paragraphs and list items, each given as one line, at 100 columns."""
    wrapped = []
    for line in lines:
        marker = re.match(r"(-|\d+\.) ", line)
        indent = " " * len(marker[0]) if marker else ""
        wrapped += textwrap.wrap(line, 100, subsequent_indent=indent, break_on_hyphens=False)
    return wrapped


def fill(path: Path, name: str, lines: list[str]) -> None:
    """Replace the text between `<!-- name -->` and `<!-- end of … -->` of a page.

    Args:
        path: Markdown file.
        name: Text of the first comment; the second has only the part before a colon.
        lines: New text.

    Raises:
        ValueError: The page has no such comments.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name.partition(':')[0]} -->"
    text = "\n".join([begin, *lines, end])
    before = path.read_text()
    after = re.sub(f"{re.escape(begin)}.*{re.escape(end)}", lambda _: text, before, flags=re.S)
    if text not in after:
        raise ValueError(f"{path} has no comments <!-- {name} -->")
    path.write_text(after)
