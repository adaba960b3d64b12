"""Puts what scripts measure into pages, between the two comments that belong to it."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def fill(path: Path, name: str, lines: list[str]) -> None:
    """Puts lines where the page has `<!-- name -->` and `<!-- end of … -->`; a name may go on after a colon."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name.partition(':')[0]} -->"
    text = "\n".join([begin, *lines, end])
    before = path.read_text()
    after = re.sub(f"{re.escape(begin)}.*{re.escape(end)}", lambda _: text, before, flags=re.S)
    if text not in after:
        raise ValueError(f"{path} has no place for {name}")
    path.write_text(after)
