"""Imports point one way, and nobody outside its file knows a method's name."""

import ast
import re
from pathlib import Path

import pytest

from metalearn.composition import conf_dir, families, options

_PACKAGE = Path(__file__).parent.parent / "metalearn"
_FILES = sorted(path for path in _PACKAGE.rglob("*.py"))

_BASE = {"types", "errors", "settings", "random", "atomic", "download"}
_DATA = _BASE | {"episodes"}
_RUN = _BASE | {
    "interrupts",
    "lock",
    "training",
    "processes",
    "engine",
    "episodes",
    "build",
    "stats",
    "config",
    "checkpoint",
}

#: What each module or folder may import of this package besides itself.
_ALLOWED = {
    "__init__": {"model"}, "__main__": {"cli"}, "errors": set(), "help_texts": set(), "settings": set(), "atomic": set(), "random": set(),
    "types": set(), "download": {"errors"}, "processes": set(), "stats": {"types"}, "checkpoint": {"errors", "atomic", "types"},
    "backbones": _BASE,
    "algorithms": _BASE | {"backbones"},
    "episodes": _BASE,
    "data": _DATA,
    "engine": {"types", "errors", "algorithms"},
    "config": {"errors", "settings"},
    "composition": {"config", "errors"},
    "interrupts": set(), "lock": {"errors"}, "training": _BASE | {"build"}, "finite": _BASE | {"build", "training"},
    "build": _BASE | {"config", "engine", "episodes", "algorithms", "processes"},
    "loop": _RUN | {"finite"},
    "figures": set(),
    "tracking": {"config", "types", "figures", "errors", "atomic"},
    "report": {"figures", "types", "atomic", "stats", "errors"},
    "measure": _RUN | {"loop", "report"},
    "model": _RUN | {"composition"},
    "verbs": _RUN | {"composition", "loop", "measure", "report", "figures", "tracking"},
    "launch": _RUN | {"composition", "verbs", "report", "types"},
    "cli": _RUN | {"launch", "composition", "help_texts", "verbs", "report"},
}  # fmt: skip


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
    assert own - {parts[0], "__version__"} <= _ALLOWED[parts[0]]
    assert not {name for name in found if name.split(".")[0] == "wandb"} or parts == ("tracking",)
    assert not {name for name in found if name.split(".")[0] == "hydra"} or parts[0] in ("launch", "composition")


def test_nothing_outside_its_own_file_knows_a_method_or_a_data_set():
    for group, folder in (("algo", "algorithms"), ("dataset", "data")):
        own: dict[str, set[str]] = {}  # module of a class -> all names it goes by
        for name in options(group):
            text = (conf_dir() / group / f"{name}.yaml").read_text()
            parent = re.search(r"^  - (\w+)$", text.replace("  - _self_\n", ""), re.M)  # a YAML over another's class
            if "_target_" not in text:
                text = (conf_dir() / group / f"{parent[1]}.yaml").read_text()
            target = re.search(rf"metalearn\.{folder}\.(\w+)\.(\w+)", text)
            own.setdefault(target[1], set()).update({name, target[2].lower(), target[1]})
        for path in _FILES:
            if path.name == "help_texts.py":  # shows examples
                continue
            code = ast.unparse(ast.parse(path.read_text()))
            code = re.sub(r"(\"\"\".*?\"\"\"|'''.*?''')", "", code, flags=re.S).lower()
            for module, names in own.items():
                if path.stem == module:
                    continue
                for name in names - {"folder"}:
                    known = rf"['\"]{name}['\"]|algo={name}\b|import {name}\b"
                    assert not re.search(known, code), f"{path} knows {name}"


def test_every_method_says_its_family_and_its_paper():
    assert sorted(name for names in families().values() for name in names) == sorted(options("algo"))
    assert list(families()) == ["gradient", "metric", "memory", "transfer"]
    for name, line in options("algo").items():
        assert re.search(r"\d{4}", line), f"conf/algo/{name}.yaml should name its paper's year"
