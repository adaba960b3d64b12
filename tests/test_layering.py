"""Imports follow the layers, and no other file names a method or a dataset."""

import ast
import re
from pathlib import Path

import pytest

from metalearn.config.choices import FAMILIES, conf_dir, families, options

_PACKAGE = Path(__file__).parent.parent / "metalearn"
_FILES = sorted(path for path in _PACKAGE.rglob("*.py"))

#: Leaf modules that every folder may import.
_LEAVES = {"system.errors", "config.fields"}
#: Modules that each folder or top-level module may import, in addition to itself and the leaves.
_ALLOWED = {
    "system": set(),
    "config": {"system"},
    "tasks": set(),
    "backbones": {"tasks", "system.atomic", "system.download"},
    "algorithms": {"tasks", "backbones"},
    "data": {"tasks", "system.atomic", "system.download"},
    "engine": {"tasks", "algorithms"},
    "report": {"tasks", "system", "config"},
    "run": {"tasks", "backbones", "algorithms", "data", "engine", "report", "system", "config"},
    "predict": {
        *("tasks", "backbones", "algorithms", "data", "engine", "report", "run"),
        *("system", "config"),
    },
    "cli": {
        *("tasks", "backbones", "algorithms", "data", "engine"),
        *("report", "system", "config", "run", "predict"),
    },
    "testing": {"tasks", "backbones", "algorithms", "data", "engine", "report", "config", "run"},
    "__init__": {"run", "predict"},
    "__main__": {"cli"},
}


def imports_of(path: Path) -> set[str]:
    """Return the names of all modules that a file imports, at any level of the code."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and str(node.module).count(".") < 2:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(str(node.module))
    return modules


@pytest.mark.parametrize("path", _FILES, ids=lambda path: str(path.relative_to(_PACKAGE)))
def test_imports_point_one_way(path):
    parts = path.relative_to(_PACKAGE).with_suffix("").parts
    modules = imports_of(path)
    for name in sorted(modules):
        own = name.removeprefix("metalearn.").split(".")
        if name.startswith("metalearn.") and own[0] not in (parts[0], "__version__"):
            allowed = _ALLOWED[parts[0]] | _LEAVES
            assert own[0] in allowed or ".".join(own[:2]) in allowed, name
    assert not {name for name in modules if name.split(".")[0] == "wandb"} or parts == (
        "report",
        "wandb_run",
    )
    assert not {name for name in modules if name.split(".")[0] == "hydra"} or parts in (
        ("cli", "_launch"),
        ("config", "composition"),
        ("config", "sweeps"),
    )


#: (file, name) pairs that are allowed: a hint in an error message, small data for checks; and
#: `augment.mix`, which has the name of a dataset.
_HINTS = {
    ("checking.py", "mix"),
    ("pairings.py", "mix"),
    ("parts.py", "mix"),
    ("download.py", "glyphs"),
    ("folder.py", "glyphs"),
    ("cases.py", "gaussians"),
    ("cases.py", "glyphs"),
    ("cases.py", "protonet"),
    # The setting augment.mix.
    *((name, "mix") for name in ("checking.py", "pairings.py", "parts.py")),
}


def test_no_other_file_names_a_method_or_a_dataset():
    for group, folder in (("algo", "algorithms"), ("dataset", "data")):
        own: dict[str, set[str]] = {}  # module of a class -> its names
        for name in options(group):
            text = (conf_dir() / group / f"{name}.yaml").read_text()
            # A YAML may extend another one and use its class.
            parent = re.search(r"^  - (\w+)(@dataset)?$", text.replace("  - _self_\n", ""), re.M)
            if "_target_" not in text and parent:
                text = (conf_dir() / group / f"{parent[1]}.yaml").read_text()
            target = re.search(rf"metalearn\.{folder}\.(\w+)\.(\w+)", text)
            assert target
            own.setdefault(target[1], set()).update({name, target[2].lower(), target[1]})
        for path in _FILES:
            tree = ast.parse(path.read_text())
            is_help = [
                isinstance(node, ast.Assign) and "HELP" in ast.unparse(node.targets[0])
                for node in tree.body
            ]
            tree.body = [node for node, skip in zip(tree.body, is_help, strict=True) if not skip]
            code = ast.unparse(tree)
            code = re.sub(r"(\"\"\".*?\"\"\"|'''.*?''')", "", code, flags=re.S).lower()
            for module, names in own.items():
                for name in names - {"folder", "text", "features"} if path.stem != module else ():
                    known = rf"['\"]{name}['\"]|{group}={name}\b|metalearn[\w.]* import {name}\b"
                    assert (path.name, name) in _HINTS or not re.search(known, code), (
                        f"{path} names {name}"
                    )


def test_every_method_states_its_family_and_the_year_of_its_paper():
    assert sorted(name for names in families().values() for name in names) == sorted(
        options("algo")
    )
    assert set(families()) <= set(FAMILIES)
    for name, line in options("algo").items():
        assert re.search(r"\d{4}", line), f"conf/algo/{name}.yaml should name its paper's year"
