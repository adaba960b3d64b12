"""Look up the settings of methods, datasets and backbones, and create these components.

A generated index has the settings of metalearn's own classes, so that a mistyped name is reported
without importing torch. Settings of plugins are read from their classes.
"""

import dataclasses
import functools
import json
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metalearn.config import plugins
from metalearn.system.errors import UserError

_PACKAGE = Path(__file__).parent.parent

#: The package's settings, losses and augmentations; written by scripts/settings_index.py.
INDEX_FILE = _PACKAGE / "config" / "settings_index.json"

#: Package of the classes of each group, and a method that they all have; loggers have names.
_HOMES = {
    "algo": ("algorithms", "adapt"),
    "dataset": ("data", "open"),
    "backbone": ("backbones", "embed"),
    "logger": ("report", "log_result"),
}

_PLAIN: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": bool}

#: Types of settings by their name in the index.
TYPES: dict[str, Any] = {
    **_PLAIN,
    **{f"{name} | None": kind | None for name, kind in _PLAIN.items()},
    **{f"list[{name}]": list[kind] for name, kind in _PLAIN.items()},  # type: ignore[valid-type]
    **{f"dict[str, {name}]": dict[str, kind] for name, kind in _PLAIN.items()},  # type: ignore[valid-type]
    "dict[str, Any]": dict[str, Any],
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting."""

    name: str
    kind: Any  # its type
    rule: Mapping[str, Any]  # bounds, role and so on; see `metalearn.config.fields`
    default: tuple[Any, ...] = ()  # (value,), or () if there is none


def conf_dir() -> Path:
    """Return the folder `conf/`: inside an installed package, or next to it in a checkout."""
    inside = _PACKAGE / "conf"
    return inside if inside.is_dir() else _PACKAGE.parent / "conf"


def component(node: Any, where: str) -> Any:
    """Return the class that the `_target_` of the group `where` names, here or in a plugin.

    Raise UserError if it names anything else.
    """
    target = _target(node, where)
    cls = plugins.import_object(target, f"{where}._target_")
    if cls is None:
        raise UserError(f"{where}._target_={target}: there is no such class")
    method = _HOMES[where.partition(".")[0]][1]
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and hasattr(cls, method)):
        raise UserError(
            f"{where}._target_={target}: should be a dataclass with the method {method}"
        )
    return cls


def _target(node: Any, where: str) -> str:
    """Return a group's `_target_`, after checking its package but without importing it."""
    target = node.get("_target_") if isinstance(node, Mapping) else None
    home = f"metalearn.{_HOMES[where.partition('.')[0]][0]}"
    if isinstance(target, str) and re.fullmatch(r"\w+(\.\w+)+", target):
        if re.fullmatch(rf"{re.escape(home)}\.\w+\.\w+", target):
            return target
        if not plugins.is_own_or_standard(target):
            plugins.check_allowed(target, f"{where}._target_", f"name a class in {home}")
            return target
    raise UserError(f"{where}._target_={target}: should name a class in {home}")


@functools.cache
def _index() -> tuple[dict[str, list[Setting]], dict[str, list[str]]]:
    """Return the settings by `_target_`, and the names of functions by group."""

    def setting(name: str, type: str, **rule: Any) -> Setting:
        default = (rule.pop("default"),) if "default" in rule else ()
        return Setting(name, TYPES[type], rule, default)

    content = json.loads(INDEX_FILE.read_text())
    names = content.pop("names")
    return {key: [setting(**one) for one in own] for key, own in content.items()}, names


def names(group: str) -> list[str]:
    """Return the names of the package's functions of a group: "loss", "augment" or "mix"."""
    return _index()[1][group]


@functools.cache
def settings_of(cls: type) -> list[Setting]:
    """Return the settings that a dataclass declares."""
    hints = typing.get_type_hints(cls)
    settings = []
    for field in dataclasses.fields(cls):
        if "runtime" in field.metadata:
            continue
        make: Any = field.default_factory
        defaults = (field.default, dataclasses.MISSING if make is dataclasses.MISSING else make())
        default = tuple(value for value in defaults if value is not dataclasses.MISSING)
        settings.append(Setting(field.name, hints[field.name], dict(field.metadata), default))
    return settings


def component_settings(node: Any, where: str, is_strict: bool = True) -> list[Setting]:
    """Return the settings of the class of the group `where`, without importing one of this package.

    Raise UserError if there is no such class; if not `is_strict`, it has no settings.
    """
    try:
        target = _target(node, where)
        if (known := _index()[0].get(target)) is not None:
            return known
        if target.startswith("metalearn."):
            raise UserError(f"{where}._target_={target}: there is no such class")
        return settings_of(component(node, where))
    except UserError:
        if is_strict:
            raise
        return []


def make(settings: dict[str, Any], where: str, **runtime: Any) -> Any:
    """Create the component that the settings of the group `where` describe, or raise UserError.

    `runtime` has the values of fields declared with `given_by_run`; others are ignored.
    """
    values = {key: value for key, value in settings.items() if key != "_target_"}
    cls = component(settings, where)
    for setting in settings_of(cls):
        if inner := setting.rule.get("components"):
            values[setting.name] = {
                name: make(node, inner, **runtime) for name, node in values[setting.name].items()
            }
    declared = {field.name for field in dataclasses.fields(cls) if "runtime" in field.metadata}
    return cls(**values, **{key: value for key, value in runtime.items() if key in declared})


def nested(kind: Any) -> type | None:
    """Return the dataclass in a setting's type (`X` or `X | None`), or None."""
    parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return next(
        (one for one in parts if isinstance(one, type) and dataclasses.is_dataclass(one)), None
    )
