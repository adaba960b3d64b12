"""Imports point one way, and nobody outside its file knows a method's name."""

import ast
import re
from pathlib import Path

import pytest

from metalearn.config.composition import conf_dir, families, options

_PACKAGE = Path(__file__).parent.parent / "metalearn"
_FILES = sorted(path for path in _PACKAGE.rglob("*.py"))

#: Leaf modules that every folder may import.
_LEAVES = {"system.errors", "config.fields"}
#: What each folder or top-level module may import of this package besides itself and the leaves. One row per folder.
_ALLOWED = {
    "system": set(),
    "config": {"system"},
    "tasks": set(),
    "backbones": {"tasks", "system.download"},
    "algorithms": {"tasks", "backbones"},
    "data": {"tasks", "system.atomic", "system.download"},
    "engine": {"tasks", "algorithms"},
    "report": {"tasks", "system", "config"},
    "run": {"tasks", "backbones", "algorithms", "data", "engine", "report", "system", "config"},
    "cli": {"tasks", "backbones", "algorithms", "data", "engine", "report", "system", "config", "run"},
    "testing": {"tasks", "backbones", "algorithms", "data", "engine", "report", "config", "run"},
    "__init__": {"run"},
    "__main__": {"cli"},
}


def imported(path: Path) -> set[str]:
    """Modules of this package (their first part) and others that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and str(node.module).count(".") < 2:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return found


@pytest.mark.parametrize("path", _FILES, ids=lambda path: str(path.relative_to(_PACKAGE)))
def test_imports_point_one_way(path):
    parts = path.relative_to(_PACKAGE).with_suffix("").parts
    modules = imported(path)
    for name in sorted(modules):
        own = name.removeprefix("metalearn.").split(".")
        if name.startswith("metalearn.") and own[0] not in (parts[0], "__version__"):
            allowed = _ALLOWED[parts[0]] | _LEAVES
            assert own[0] in allowed or ".".join(own[:2]) in allowed, name
    assert not {name for name in modules if name.split(".")[0] == "wandb"} or parts == (
        "report",
        "tracker",
    )
    assert not {name for name in modules if name.split(".")[0] == "hydra"} or parts in (
        ("cli", "launch"),
        ("config", "composition"),
    )


#: Where a name is meant for people: a hint in an error, the small data of checks.
_HINTS = {
    ("download.py", "glyphs"),
    ("folder.py", "glyphs"),
    ("testing.py", "gaussians"),
    ("testing.py", "protonet"),
}


def test_nothing_outside_its_own_file_knows_a_method_or_a_dataset():
    for group, folder in (("algo", "algorithms"), ("dataset", "data")):
        own: dict[str, set[str]] = {}  # module of a class -> all names it goes by
        for name in options(group):
            text = (conf_dir() / group / f"{name}.yaml").read_text()
            parent = re.search(
                r"^  - (\w+)$", text.replace("  - _self_\n", ""), re.M
            )  # a YAML over another's class
            if "_target_" not in text and parent:
                text = (conf_dir() / group / f"{parent[1]}.yaml").read_text()
            target = re.search(rf"metalearn\.{folder}\.(\w+)\.(\w+)", text)
            assert target
            own.setdefault(target[1], set()).update({name, target[2].lower(), target[1]})
        for path in _FILES:
            if path.name == "help_texts.py":  # shows examples
                continue
            code = ast.unparse(ast.parse(path.read_text()))
            code = re.sub(r"(\"\"\".*?\"\"\"|'''.*?''')", "", code, flags=re.S).lower()
            for module, names in own.items():
                for name in names - {"folder"} if path.stem != module else ():
                    known = rf"['\"]{name}['\"]|{group}={name}\b|metalearn[\w.]* import {name}\b"
                    assert (path.name, name) in _HINTS or not re.search(known, code), (
                        f"{path} knows {name}"
                    )


def test_every_method_says_its_family_and_its_paper():
    assert sorted(name for names in families().values() for name in names) == sorted(
        options("algo")
    )
    assert list(families()) == ["gradient", "metric", "memory", "transfer"]
    for name, line in options("algo").items():
        assert re.search(r"\d{4}", line), f"conf/algo/{name}.yaml should name its paper's year"
