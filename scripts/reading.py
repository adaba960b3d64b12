"""Count the lines to read before extending metalearn, and those of methods added to it.

python scripts/reading.py

Writes the tables of docs/extending.md. The first counts the relevant sections of the page and every
line of the files that it builds on. The second counts lines of code, without docstrings, comments
and blank lines, and lists the files that the commits of these methods changed.
"""

import ast
import re
import statistics

from pages import ROOT, fill, wrap

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
#: Methods that were added to a complete metalearn, each in a file of its own.
_ADDED = [
    "bd_cspn", "calibration", "cavia", "feat", "frn", "hallucinate", "in_context",
    "laplacian_shot", "lora", "meta_baseline", "meta_curvature", "meta_lstm", "metaopt_svm",
    "pt_map", "simclr", "simple_shot", "snail", "soft_kmeans", "tim", "transductive_finetune",
]  # fmt: skip


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


def code_lines(method: str) -> int:
    """Return the number of lines of code of a method's file."""
    text = (ROOT / f"metalearn/algorithms/{method}.py").read_text()
    other = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            own = node.body[0]
            other |= set(range(own.lineno, (own.end_lineno or own.lineno) + 1))
    rows = enumerate(map(str.strip, text.splitlines()), 1)
    return sum(bool(row) and row[0] != "#" and number not in other for number, row in rows)


def naming() -> list[str]:
    """Return the files of metalearn outside algorithms/ that name an added method's class."""
    texts = (ROOT / f"conf/algo/{method}.yaml" for method in _ADDED)
    classes = [re.findall(r"_target_: .*\.(\w+)", path.read_text())[0] for path in texts]
    pattern = re.compile(rf"\b({'|'.join(classes)})\b")
    files = sorted((ROOT / "metalearn").rglob("*.py"))
    own = ROOT / "metalearn/algorithms"
    return [
        file.name for file in files if own not in file.parents and pattern.search(file.read_text())
    ]


def methods() -> list[str]:
    """Return a paragraph on the lines of code of the methods that were added."""
    count = {method: code_lines(method) for method in _ADDED}
    each = ", ".join(f"{method} {number}" for method, number in count.items())
    text = (
        f"{len(count)} methods were added to metalearn, with {min(count.values())} to "
        f"{max(count.values())} lines of code each, median {statistics.median(count.values()):g} "
        f"({each}). Files outside algorithms/ that name one of them: "
        f"{', '.join(naming()) or 'none'}."
    )
    return wrap([text])


def main() -> None:
    """Write the tables of docs/extending.md."""
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
    fill(_PAGE, "methods: written by scripts/reading.py", methods())


if __name__ == "__main__":
    main()
