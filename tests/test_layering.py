"""Imports point one way, and nobody outside its file knows a method's name."""

import ast
import re
from pathlib import Path

import pytest

from metalearn.composition import conf_dir, families, options

_PACKAGE = Path(__file__).parent.parent / "metalearn"
_FILES = sorted(path for path in _PACKAGE.rglob("*.py"))

_BASE = {"tasks", "errors", "settings"}
_FILES_TOO = {"atomic", "download"}
_RUN = _BASE | {
    "config", "composition", "plugins", "processes", "engine", "algorithms", "backbones", "data", "build", "optimisers", "meter",
    "training", "finite", "loop", "checkpoint", "stats", "measure", "interrupts", "lock", "atomic",
}  # fmt: skip
_SHOW = {"report", "figures", "tracking"}

#: What each module or folder may import of this package besides itself.
_ALLOWED = {
    "__init__": {"model"},
    "__main__": {"cli"},
    "errors": set(),
    "help_texts": set(),
    "settings": set(),
    "atomic": set(),
    "tasks": {"errors"},
    "download": {"errors"},
    "processes": set(),
    "plugins": {"errors"},
    "stats": {"tasks"},
    "checkpoint": {"errors", "atomic", "tasks"},
    "backbones": _BASE | {"download"},
    "algorithms": _BASE | {"backbones"},
    "data": _BASE | _FILES_TOO,
    "engine": {"tasks", "errors", "algorithms"},
    "config": {"errors", "settings", "plugins"},
    "composition": {"config", "errors", "plugins"},
    "interrupts": set(),
    "lock": {"errors"},
    "meter": {"tasks"},
    "optimisers": {"config", "errors"},
    "build": _BASE
    | {"config", "engine", "algorithms", "backbones", "processes", "optimisers", "plugins", "data"},
    "training": _BASE | {"build", "config", "meter", "optimisers"},
    "finite": _BASE | {"build", "meter", "atomic"},
    "loop": _BASE
    | {"build", "training", "finite", "checkpoint", "interrupts", "optimisers", "stats", "engine"},
    "figures": set(),
    "tracking": {"config", "tasks", "figures", "errors", "atomic"},
    "report": {"figures", "tasks", "atomic", "stats", "errors"},
    "measure": _BASE | {"build", "checkpoint", "loop", "stats", "report"},
    "model": _BASE | {"build", "checkpoint", "composition", "config", "plugins"},
    "testing": _RUN,
    "verbs": _RUN | _SHOW,
    "launch": _RUN | _SHOW | {"verbs"},
    "cli": _RUN | _SHOW | {"launch", "help_texts", "verbs"},
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
            found.add(str(node.module))
    return found


@pytest.mark.parametrize("path", _FILES, ids=lambda path: str(path.relative_to(_PACKAGE)))
def test_imports_point_one_way(path):
    parts = path.relative_to(_PACKAGE).with_suffix("").parts
    found = imported(path)
    own = {name.split(".")[1] for name in found if name.startswith("metalearn.")}
    assert own - {parts[0], "__version__"} <= _ALLOWED[parts[0]]
    assert not {name for name in found if name.split(".")[0] == "wandb"} or parts == ("tracking",)
    assert not {name for name in found if name.split(".")[0] == "hydra"} or parts[0] in (
        "launch",
        "composition",
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
