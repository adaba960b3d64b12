"""The settings of methods, datasets and backbones, from a generated index or from their classes.

The package's own are in the index, so that a mistyped word is answered without importing torch.
"""

import dataclasses
import functools
import importlib
import json
import re
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metalearn.config import plugins
from metalearn.system.errors import UserError

_PACKAGE = Path(__file__).parent.parent

#: Settings of the package's own components; written by scripts/settings_index.py.
INDEX_FILE = _PACKAGE / "config" / "settings_index.json"

_FLAGS = ("role", "rounds", "in_testing")

#: Where the classes of each group are, and a method that they all have.
_HOMES = {
    "algo": ("algorithms", "adapt"),
    "dataset": ("data", "open"),
    "backbone": ("backbones", "embed"),
}

_PLAIN: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": bool}

#: Types of settings by the name that the index has for them.
_TYPES: dict[str, Any] = {
    **_PLAIN,
    **{f"{name} | None": kind | None for name, kind in _PLAIN.items()},
    **{f"list[{name}]": list[kind] for name, kind in _PLAIN.items()},  # type: ignore[valid-type]
    **{f"dict[str, {name}]": dict[str, kind] for name, kind in _PLAIN.items()},  # type: ignore[valid-type]
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting. kind: its type; rule: its bounds, role and so on; default: () for none, else (value,)."""

    name: str
    kind: Any
    rule: Mapping[str, Any]
    default: tuple[Any, ...] = ()


def conf_dir() -> Path:
    """Return the folder `conf/`: inside an installed package, or beside it in a checkout."""
    inside = _PACKAGE / "conf"
    return inside if inside.is_dir() else _PACKAGE.parent / "conf"


def component(node: Any, where: str) -> Any:
    """Return the class that a group's `_target_` names: of this package, or of a plugin that was named.

    Raises:
        UserError: for anything else.
    """
    target = _target(node, where)
    module, _, name = target.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise UserError(f"{where}._target_={target}: there is no such class") from None
    if not (
        isinstance(cls, type) and dataclasses.is_dataclass(cls) and hasattr(cls, _HOMES[where][1])
    ):
        raise UserError(f"{where}._target_={target}: is no class for {where}")
    return cls


def _target(node: Any, where: str) -> str:
    """Return a group's `_target_`, which may name a class but has not been imported."""
    target = node.get("_target_") if isinstance(node, Mapping) else None
    home = _HOMES[where][0]
    package = str(target).partition(".")[0]
    if isinstance(target, str) and re.fullmatch(r"\w+(\.\w+)+", target):
        if re.fullmatch(rf"metalearn\.{home}\.\w+\.\w+", target) or package in plugins.packages():
            return target
        if package != "metalearn" and package not in sys.stdlib_module_names:
            raise UserError(
                f"{where}._target_={target}: {package} is not a plugin of this installation; if you trust it, add "
                f"plugins=[{package}]; otherwise name a class in metalearn.{home}"
            )
    raise UserError(f"{where}._target_={target}: should name a class in metalearn.{home}")


@functools.cache
def _index() -> dict[str, list[Setting]]:
    stored = json.loads(INDEX_FILE.read_text())
    return {target: [_from_plain(one) for one in settings] for target, settings in stored.items()}


def _from_plain(one: dict[str, Any]) -> Setting:
    rule = {name: value for name, value in one.items() if name not in ("name", "type", "default")}
    return Setting(
        one["name"], _TYPES[one["type"]], rule, (one["default"],) if "default" in one else ()
    )


def to_plain(setting: Setting) -> dict[str, Any]:
    """Return a setting of a component as plain data, as the index has it."""
    name = next(name for name, kind in _TYPES.items() if kind == setting.kind)
    default = {"default": setting.default[0]} if setting.default else {}
    rule = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in setting.rule.items()
    }
    return {"name": setting.name, "type": name, **default, **rule}


@functools.cache
def settings_of(cls: type) -> list[Setting]:
    """Return the settings that a dataclass declares."""
    hints = typing.get_type_hints(cls)
    settings = []
    for field in dataclasses.fields(cls):
        if "runtime" in field.metadata:
            continue
        default: tuple[Any, ...] = ()
        if field.default is not dataclasses.MISSING:
            default = (field.default,)
        elif field.default_factory is not dataclasses.MISSING:
            default = (field.default_factory(),)
        rule = {key: value for key, value in field.metadata.items() if value or key not in _FLAGS}
        settings.append(Setting(field.name, hints[field.name], rule, default))
    return settings


def component_settings(node: Any, where: str) -> list[Setting]:
    """Return the settings of a group's class; those of this package without importing it."""
    target = _target(node, where)
    known = _index()
    if target in known:
        return known[target]
    if target.startswith("metalearn."):
        raise UserError(f"{where}._target_={target}: there is no such class")
    return settings_of(component(node, where))


def make(settings: dict[str, Any], where: str, **runtime: Any) -> Any:
    """Return the component that checked settings describe, completed with its run-time objects."""
    values = {key: value for key, value in settings.items() if key != "_target_"}
    cls = component(settings, where)
    wanted = {field.name for field in dataclasses.fields(cls) if "runtime" in field.metadata}
    return cls(**values, **{key: value for key, value in runtime.items() if key in wanted})


def nested(kind: Any) -> type | None:
    """Return the dataclass that a setting's type is, perhaps with None, or None."""
    parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return next(
        (one for one in parts if isinstance(one, type) and dataclasses.is_dataclass(one)), None
    )


def known_settings(node: Any, where: str, is_strict: bool) -> list[Setting]:
    try:
        return component_settings(node, where)
    except UserError:
        if is_strict:
            raise
        return []
