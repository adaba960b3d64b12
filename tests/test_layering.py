"""Imports point one way, and nobody outside its file knows a method's name."""

import ast
import re
from pathlib import Path

import pytest

from metalearn.composition import conf_dir, options

_PACKAGE = Path(__file__).parent.parent / "metalearn"
_FILES = sorted(path for path in _PACKAGE.rglob("*.py"))

#: What a layer may import of this package; each stands on those before it.
_FORBIDDEN = {
    "algorithms": {
        "engine",
        "loop",
        "tracking",
        "build",
        "cli",
        "jobs",
        "report",
        "config",
        "data",
        "episodes",
        "stats",
    },
    "backbones": {
        "algorithms",
        "engine",
        "loop",
        "tracking",
        "build",
        "cli",
        "jobs",
        "report",
        "config",
        "data",
        "episodes",
    },
    "data": {
        "algorithms",
        "backbones",
        "engine",
        "loop",
        "tracking",
        "build",
        "cli",
        "jobs",
        "report",
        "config",
        "composition",
    },
    "types": {"algorithms", "backbones", "engine", "loop", "build", "cli", "config", "composition", "data", "episodes"},
    "engine": {"loop", "tracking", "build", "cli", "jobs", "report", "config", "composition", "data", "episodes"},
    "loop": {"tracking", "cli", "jobs", "report", "config", "composition", "data", "algorithms"},
    "build": {"loop", "tracking", "cli", "jobs", "report"},
    "jobs": {"cli"},
}


def imported(path: Path) -> set[str]:
    """Modules of this package (their first part) and others that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "metalearn":
            found |= {f"metalearn.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", _FILES, ids=lambda path: str(path.relative_to(_PACKAGE)))
def test_imports_point_one_way(path):
    parts = path.relative_to(_PACKAGE).with_suffix("").parts
    found = imported(path)
    own = {name.split(".")[1] for name in found if name.startswith("metalearn.")}
    assert not own & _FORBIDDEN.get(parts[0], set())
    assert "wandb" not in found or parts == ("tracking",)
    assert not {name for name in found if name.split(".")[0] == "hydra"} or parts[0] in ("cli", "composition")


def test_nothing_outside_its_own_file_knows_a_method_or_a_data_set():
    for group, folder in (("algo", "algorithms"), ("dataset", "data")):
        own = {}
        for name in options(group):
            text = (conf_dir() / group / f"{name}.yaml").read_text()
            if target := re.search(rf"metalearn\.{folder}\.(\w+)\.(\w+)", text):
                own[target[1]] = {name, target[2].lower(), target[1]}
        for path in _FILES:
            if path.name == "cli.py":  # its help shows examples
                continue
            code = ast.unparse(ast.parse(path.read_text()))
            code = re.sub(r"(\"\"\".*?\"\"\"|'''.*?''')", "", code, flags=re.S).lower()
            for module, names in own.items():
                if path.stem == module:
                    continue
                for name in names - {"folder"}:
                    assert not re.search(rf"['\"]{name}['\"]|import {name}\b", code), f"{path} knows {name}"
