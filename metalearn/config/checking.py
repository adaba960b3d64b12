"""Check a composed configuration against the schema.

A mistake raises UserError: what is wrong, where it was set, what would be right.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metalearn.config.components import (
    Setting,
    component_settings,
    conf_dir,
    known_settings,
    nested,
    settings_of,
)
from metalearn.config.schema import COMPONENTS, RunConfig
from metalearn.system.errors import UserError, first_line, nearest


def complete(plain: dict[str, Any], is_strict: bool = True) -> dict[str, Any]:
    """Return a configuration as plain data with the defaults of settings that it lacks, as runs of earlier versions do.

    Args:
        plain: as YAML has it.
        is_strict: whether an unknown class is an error, and not left as it is.
    """
    train = plain.get("train")
    short = train.get("optimiser") if isinstance(train, dict) else None
    if short in ("adam", "sgd"):
        plain = {
            **plain,
            "optimiser": _optimiser(short),
            "train": {**plain["train"], "optimiser": None},
        }
    plain = {"optimiser": _optimiser("adam"), "loss": {}, "augment": {}, **plain}
    for name in COMPONENTS:
        node = plain.get(name)
        if isinstance(node, Mapping) and "_target_" in node:
            plain[name] = _completed(known_settings(node, name, is_strict), node)
    return _completed(settings_of(RunConfig), plain)


@functools.cache
def _optimiser(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(
        (conf_dir() / "optimiser" / f"{name}.yaml").read_text()
    )
    return content


def _completed(settings: list[Setting], node: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(node)
    for setting in settings:
        if setting.name not in values and setting.default:
            values[setting.name] = setting.default[0]
        kind = nested(setting.kind)
        if kind is not None and isinstance(values.get(setting.name), Mapping):
            values[setting.name] = _completed(settings_of(kind), values[setting.name])
    return values


def checked(config: DictConfig) -> RunConfig:
    """Return the configuration as typed dataclasses; components keep their plain settings as dicts.

    Raises:
        UserError: for an unknown key, a wrong type, a missing value or one out of bounds.
    """
    try:
        resolved: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(first_line(error)) from None
    resolved = complete(resolved)
    parts: dict[str, Any] = {}
    own = [setting for setting in settings_of(RunConfig) if setting.name not in COMPONENTS]
    plain = OmegaConf.create(
        {key: value for key, value in resolved.items() if key not in COMPONENTS}
    )
    run = _conform(own, plain, "")
    _check_bounds(own, run, "")
    for key, value in run.items():
        if key == "optimiser":
            parts["optimiser"] = OmegaConf.to_container(value)
        else:
            parts[str(key)] = OmegaConf.to_object(value) if isinstance(value, DictConfig) else value
    for name in COMPONENTS:
        node = resolved.get(name)
        settings = component_settings(node, name)
        values = OmegaConf.create({key: value for key, value in node.items() if key != "_target_"})
        typed = _conform(settings, values, f"{name}.")
        _check_bounds(settings, typed, f"{name}.")
        content: Any = OmegaConf.to_container(typed)
        parts[name] = {"_target_": node["_target_"], **content}
    return RunConfig(**parts)


def plain(settings: RunConfig) -> dict[str, Any]:
    """Return a checked configuration as plain data."""
    return dataclasses.asdict(settings)


def _schema(settings: list[Setting]) -> DictConfig:
    """Return settings as an OmegaConf schema, all of them missing yet."""
    fields = [(setting.name, setting.kind) for setting in settings]
    return OmegaConf.structured(dataclasses.make_dataclass("Settings", fields))


def _names(settings: list[Setting], where: str = "") -> list[str]:
    """Return the dotted names of all settings."""
    names = []
    for setting in settings:
        kind = nested(setting.kind)
        name = f"{where}{setting.name}"
        names += (
            _names(settings_of(kind), f"{name}.")
            if kind is setting.kind and kind is not None
            else [name]
        )
    return names


def _conform(settings: list[Setting], values: DictConfig, where: str) -> DictConfig:
    known = _names(settings)
    for key in leaves(values):
        if inside := [name for name in known if name.startswith(f"{key}.")]:
            raise UserError(f"{where}{key}: should hold settings, like {where}{inside[0]}")
        if not any(key == name or key.startswith(f"{name}.") for name in known):
            raise UserError(
                f"{where}{key}: nothing reads this key{nearest(where + key, [where + name for name in known])}"
            )
    merged: Any = _schema(settings)
    for key in map(str, values):  # one at a time, so that an error can say which
        if OmegaConf.is_missing(values, key):
            raise UserError(f"{where}{key}: has no value")
        try:
            merged.merge_with({key: values[key]})
        except OmegaConfBaseException as error:
            full = getattr(error, "full_key", None) or str(key)
            given = OmegaConf.select(values, full, default=values[key])
            raise UserError(f"{where}{full}={given}: {_reason(error)}") from None
    if missing := sorted(OmegaConf.missing_keys(merged)):
        raise UserError(f"{where}{missing[0]}: has no value")
    return merged


def leaves(node: DictConfig, where: str = "") -> Iterator[str]:
    """Yield the dotted names of all values of a configuration."""
    for key in map(str, node):
        if (
            not OmegaConf.is_missing(node, key)
            and isinstance(node[key], DictConfig)
            and len(node[key])
        ):
            yield from leaves(node[key], f"{where}{key}.")
        else:
            yield f"{where}{key}"


def _reason(error: Exception) -> str:
    line = first_line(error)
    if "not a valid bool" in line:
        return "should be true or false"
    if found := re.search(r"could not be converted to (\w+)", line):
        kind = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}.get(
            found[1], found[1].lower()
        )
        return f"should be {kind}"
    return line


def _check_bounds(settings: list[Setting], values: DictConfig, where: str) -> None:
    for setting in settings:
        if setting.name not in values:
            continue
        value, rule = values[setting.name], setting.rule
        name = f"{where}{setting.name}"
        if isinstance(value, DictConfig):
            kind = nested(setting.kind)
            if kind is not None:
                _check_bounds(settings_of(kind), value, f"{name}.")
            continue
        if value is None:
            continue
        if "choices" in rule and value not in rule["choices"]:
            raise UserError(
                f"{name}={value}: should be one of {', '.join(rule['choices'])}{nearest(str(value), rule['choices'])}"
            )
        for number in value if OmegaConf.is_list(value) else [value]:
            if isinstance(number, float) and number != number:
                raise UserError(f"{name}={value}: should be a number")
            if "minimum" in rule and number < rule["minimum"]:
                raise UserError(f"{name}={value}: should be at least {rule['minimum']}")
            if "maximum" in rule and number > rule["maximum"]:
                raise UserError(f"{name}={value}: should be at most {rule['maximum']}")
            if "above" in rule and not number > rule["above"]:
                raise UserError(f"{name}={value}: should be greater than {rule['above']}")
            if isinstance(number, int) and not -(2**31) <= number < 2**31:
                raise UserError(f"{name}={value}: is too large a number")
