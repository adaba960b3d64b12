"""Count the lines to read before extending metalearn and write the table of docs/extending.md.

python scripts/reading.py

Counts the relevant sections of docs/extending.md and every line of the files that it builds on.
"""

import re

from pages import ROOT, fill

_PAGE = ROOT / "docs/extending.md"
_DATASET = ROOT / "docs/add-dataset.md"
#: Section of the page, and files to read, for each kind of extension.
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
#: Files that those depend on; not needed to write the extension as the page shows it.
_DEPENDENCIES = {
    "a dataset": ["data/classes.py", "tasks/store.py", "config/fields.py"],
    "a gradient method": [
        "algorithms/base.py",
        "tasks/types.py",
        "config/fields.py",
        "algorithms/inner_loop.py",
    ],
}
_DEFAULT_DEPENDENCIES = ["algorithms/base.py", "tasks/types.py", "config/fields.py"]
#: Maximum number of lines to read.
LIMITS = {
    "a metric method": 300,
    "a gradient method": 400,
    "a method with unlabelled examples": 350,
    "a dataset": 200,
}


def _section(title: str) -> int:
    """Return the number of non-blank lines in a section of the page."""
    text = (_DATASET if title == "A dataset" else _PAGE).read_text()
    match = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.S | re.M)
    assert match, title
    return sum(bool(line.strip()) for line in match[1].splitlines())


def parts(kind: str) -> dict[str, int]:
    """Return the number of lines of each part to read for one kind of extension."""
    title, files = _TO_READ[kind]
    page = {"this page": _section("A package") + _section(title)}
    return page | {
        file: len((ROOT / "metalearn" / file).read_text().splitlines()) for file in files
    }


def lines(kind: str) -> int:
    """Return the number of lines to read for one kind of extension."""
    return sum(parts(kind).values())


def main() -> None:
    """Write the table of docs/extending.md."""
    head = [
        "to add",
        "lines to read",
        "where",
        "with their dependencies",
        "files edited in metalearn",
    ]
    table = [f"| {' | '.join(head)} |", "| --- | --- | --- | --- | --- |"]
    for kind in _TO_READ:
        where = ", ".join(f"{name} {count}" for name, count in parts(kind).items())
        dependencies = _DEPENDENCIES.get(kind, _DEFAULT_DEPENDENCIES)
        total = lines(kind) + sum(
            len((ROOT / "metalearn" / file).read_text().splitlines()) for file in dependencies
        )
        names = ", ".join(dependencies)
        table.append(f"| {kind} | {lines(kind)} | {where} | {total} ({names}) | none |")
    table.append(
        "| a loss, an augmentation, an optimiser | one function or one name "
        "| its section below | | none |"
    )
    fill(_PAGE, "reading: written by scripts/reading.py", table)


if __name__ == "__main__":
    main()
