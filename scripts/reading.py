"""Count the lines that somebody must read to extend metalearn, and write the table of docs/extending.md.

python scripts/reading.py

Counted are the sections of docs/extending.md that concern the extension, and the files of metalearn that it builds on, as whole files.
"""

import re

from pages import ROOT, fill

_PAGE = ROOT / "docs/extending.md"
#: Section of the page and files to read for each kind of extension.
_TO_READ = {
    "a metric method": (
        "A metric method",
        ["algorithms/embedding.py", "algorithms/batches.py", "algorithms/geometry.py"],
    ),
    "a gradient method": (
        "A gradient method",
        ["algorithms/gradient.py", "algorithms/linear_head.py"],
    ),
    "a method with unlabelled examples": (
        "A method with unlabelled examples",
        ["algorithms/embedding.py", "algorithms/batches.py", "algorithms/geometry.py"],
    ),
    "a dataset": ("A dataset", ["data/base.py"]),
}
#: Files that these rest on; they explain why, and are not needed to write the extension as the page shows it.
_BELOW = {
    "a dataset": ["tasks/store.py", "config/fields.py"],
    "a gradient method": [
        "algorithms/base.py",
        "tasks/types.py",
        "config/fields.py",
        "algorithms/inner_loop.py",
    ],
}
_BELOW_ANY = ["algorithms/base.py", "tasks/types.py", "config/fields.py"]
#: At most so many lines.
LIMITS = {
    "a metric method": 300,
    "a gradient method": 400,
    "a method with unlabelled examples": 350,
    "a dataset": 200,
}


def _section(title: str) -> int:
    """Return the number of lines of a section of the page that are not blank."""
    text = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", _PAGE.read_text(), re.S | re.M)
    assert text, title
    return sum(bool(line.strip()) for line in text[1].splitlines())


def parts(kind: str) -> dict[str, int]:
    """Return what to read for one kind of extension, with its lines."""
    title, files = _TO_READ[kind]
    own = {"this page": _section("A package") + _section(title)}
    return own | {file: len((ROOT / "metalearn" / file).read_text().splitlines()) for file in files}


def lines(kind: str) -> int:
    """Return the number of lines to read for one kind of extension."""
    return sum(parts(kind).values())


def main() -> None:
    head = [
        "to add",
        "lines to read",
        "which",
        "with the files that these rest on",
        "files edited in metalearn",
    ]
    table = [f"| {' | '.join(head)} |", "| --- | --- | --- | --- | --- |"]
    for kind in _TO_READ:
        which = ", ".join(f"{name} {count}" for name, count in parts(kind).items())
        below = _BELOW.get(kind, _BELOW_ANY)
        more = lines(kind) + sum(
            len((ROOT / "metalearn" / file).read_text().splitlines()) for file in below
        )
        table.append(f"| {kind} | {lines(kind)} | {which} | {more} ({', '.join(below)}) | none |")
    table.append(
        "| a loss, an augmentation, an optimiser | one function or one name | its section below | | none |"
    )
    fill(_PAGE, "reading: written by scripts/reading.py", table)


if __name__ == "__main__":
    main()
