"""Decide what commands may do with each setting, from its role."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from metalearn.config.components import Setting, component_settings, nested, settings_of
from metalearn.config.schema import COMPONENTS, RunConfig


def roles(plain: Mapping[str, Any], is_strict: bool = True) -> dict[str, Setting]:
    """Return the setting of each value of a complete configuration, by its dotted name.

    The rule of each setting contains its role, or else the role of its group. If not `is_strict`,
    an unknown class has no settings.
    """
    described: dict[str, Setting] = {}

    def walk(settings: list[Setting], node: Mapping[str, Any], where: str, role: str) -> None:
        for setting in settings:
            value, name = node.get(setting.name), f"{where}{setting.name}"
            own = str(setting.rule.get("role") or role)
            kind = nested(setting.kind)
            if where == "" and setting.name in COMPONENTS:
                inner = component_settings(value, setting.name, is_strict)
                walk(inner, value or {}, f"{name}.", own)
                described[f"{name}._target_"] = Setting("_target_", str, {"role": "identity"})
            elif kind is not None and isinstance(value, Mapping):
                walk(settings_of(kind), value, f"{name}.", own)
            else:
                rule = {**setting.rule, "role": "identity" if "in_testing" in setting.rule else own}
                described[name] = dataclasses.replace(setting, rule=rule)

    walk(settings_of(RunConfig), plain, "", "")
    return described


def role_of(key: str, described: Mapping[str, Setting]) -> tuple[set[str], bool]:
    """Return the roles of a dotted key, and whether results may differ by rounding.

    A key inside a setting has the setting's roles, a group those of all of it.
    """
    inside = [setting for name, setting in described.items() if name.startswith(f"{key}.")]
    name = key
    while name not in described and "." in name and not inside:
        name = name.rpartition(".")[0]
    settings = inside or ([described[name]] if name in described else [])
    roles = {role for setting in settings for role in setting.rule["role"].split()}
    return roles or {"identity"}, any(setting.rule.get("rounds") for setting in settings)


def may_resume_with(key: str, described: Mapping[str, Setting]) -> bool:
    """Return True if a resumed run may have a different value of this setting."""
    roles, rounds = role_of(key, described)
    return roles <= {"machine", "presentation"} and not rounds


def may_evaluate_with(key: str, described: Mapping[str, Setting]) -> bool:
    """Return True if a test may have a different value of this setting than training."""
    return bool(role_of(key, described)[0] & {"protocol", "machine"})


def may_reproduce_with(key: str, described: Mapping[str, Setting]) -> bool:
    """Return True if a recipe with a different value of this setting is the same experiment."""
    return role_of(key, described)[0] <= {"seed", "machine", "presentation"}


def names_of(
    described: Mapping[str, Setting], rule: Callable[[str, Mapping[str, Setting]], bool]
) -> list[str]:
    """Return the settings that a rule allows, for a message; a group if it allows all of it."""
    allowed = {name: rule(name, described) for name in described}
    partial = {name.partition(".")[0] for name, is_allowed in allowed.items() if not is_allowed}
    names = [name for name, is_allowed in allowed.items() if is_allowed]
    groups = {name: name.partition(".")[0] for name in names}
    return list(dict.fromkeys(n if groups[n] in partial else groups[n] for n in names))


def distinguishes_methods(key: str, described: Mapping[str, Setting]) -> bool:
    """Return True if runs with different values of this setting are different methods."""
    return "identity" in role_of(key, described)[0]
