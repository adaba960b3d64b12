"""What commands may do with each setting, by its role."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from metalearn.config.components import (
    Setting,
    known_settings,
    nested,
    settings_of,
)
from metalearn.config.schema import COMPONENTS, RunConfig


def roles(plain: Mapping[str, Any], is_strict: bool = True) -> dict[str, Setting]:
    """Return the setting that each value of a complete configuration belongs to, by its dotted name.

    The rule of each has the role that holds for it: its own, or that of the group around it.
    """
    described: dict[str, Setting] = {}

    def walk(settings: list[Setting], node: Mapping[str, Any], where: str, role: str) -> None:
        for setting in settings:
            value, name = node.get(setting.name), f"{where}{setting.name}"
            own = str(setting.rule.get("role") or role)
            kind = nested(setting.kind)
            if where == "" and setting.name in COMPONENTS:
                walk(known_settings(value, setting.name, is_strict), value or {}, f"{name}.", own)
                described[f"{name}._target_"] = Setting("_target_", str, {"role": "identity"})
            elif kind is not None and isinstance(value, Mapping):
                walk(settings_of(kind), value, f"{name}.", own)
            else:
                rule = {**setting.rule, "role": "identity" if "in_testing" in setting.rule else own}
                described[name] = dataclasses.replace(setting, rule=rule)

    walk(settings_of(RunConfig), plain, "", "")
    return described


def role_of(key: str, described: Mapping[str, Setting]) -> tuple[set[str], bool]:
    """Return the roles of a dotted key, and whether other values of it may round differently.

    The key may also be inside a setting, or be a group of settings: then it has the roles of all of them.
    """
    inside = [setting for name, setting in described.items() if name.startswith(f"{key}.")]
    name = key
    while name not in described and "." in name and not inside:
        name = name.rpartition(".")[0]
    found = inside or ([described[name]] if name in described else [])
    roles = {role for setting in found for role in setting.rule["role"].split()}
    return roles or {"identity"}, any(setting.rule.get("rounds") for setting in found)


def may_resume_with(key: str, described: Mapping[str, Setting]) -> bool:
    """Return True if a resumed run may have another value of this setting than the run had."""
    has, rounds = role_of(key, described)
    return has <= {"machine", "presentation"} and not rounds


def may_evaluate_with(key: str, described: Mapping[str, Setting]) -> bool:
    """Return True if a test may have another value of this setting than the training had."""
    return bool(role_of(key, described)[0] & {"protocol", "machine"})


def may_reproduce_with(key: str, described: Mapping[str, Setting]) -> bool:
    """Return True if a recipe with another value of this setting is still the same experiment."""
    return role_of(key, described)[0] <= {"seed", "machine", "presentation"}


def names_of(
    described: Mapping[str, Setting], rule: Callable[[str, Mapping[str, Setting]], bool]
) -> list[str]:
    """Return the settings that a rule allows, for a message: groups as a whole where it allows all that is inside."""
    names: dict[str, None] = {}
    for name in described:
        group = name.partition(".")[0]
        if rule(name, described):
            whole = all(
                rule(other, described) for other in described if other.partition(".")[0] == group
            )
            names[group if whole else name] = None
    return list(names)


def tells_methods_apart(key: str, described: Mapping[str, Setting]) -> bool:
    """Return True if runs that differ in this setting are different methods."""
    return "identity" in role_of(key, described)[0]
