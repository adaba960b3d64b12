"""Check a composed configuration against the schema.

A mistake raises UserError: what is wrong, where it was set, what would be right.
"""

import dataclasses
import functools
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metalearn.config import plugins
from metalearn.config.components import (
    Setting,
    component_settings,
    conf_dir,
    known_settings,
    names,
    nested,
    settings_of,
)
from metalearn.config.schema import COMPONENTS, RunConfig
from metalearn.system.errors import UserError, first_line, nearest

#: OmegaConf's names of types, in its error messages, as a user would say them.
_TYPE_NAMES = {
    "Integer": "a whole number", "Float": "a number", "Boolean": "true or false",
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text",
}  # fmt: skip
#: Types of whole numbers.
_WHOLE = (int, int | None)
#: What to report for OmegaConf's other error messages, by a part of their text.
_REASONS = {
    "not a valid bool": "should be true or false",
    "not a ListConfig": "should be a list",
    "Dict[": "should hold settings",
    "not Optional": "should have a value",
}


def complete(plain: dict[str, Any], is_strict: bool = True) -> dict[str, Any]:
    """Add the defaults of settings that a configuration lacks, as runs of older versions do.

    Args:
        plain: Configuration as plain data.
        is_strict: Whether an unknown class is an error; otherwise its settings stay as they are.
    """
    train = plain.get("train")
    short = train.get("optimiser") if isinstance(train, dict) else None
    if short in ("adam", "sgd"):
        plain = {
            **plain,
            "optimiser": {**_optimiser(short), **_changed_settings(plain.get("optimiser"))},
            "train": {**plain["train"], "optimiser": None},
        }
    plain = {"optimiser": _optimiser("adam"), "loss": {}, "augment": {}, **plain}
    for name in COMPONENTS:
        node = plain.get(name)
        if isinstance(node, Mapping) and "_target_" in node:
            plain[name] = _with_defaults(known_settings(node, name, is_strict), node)
    return _with_defaults(settings_of(RunConfig), plain)


@functools.cache
def _optimiser(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(
        (conf_dir() / "optimiser" / f"{name}.yaml").read_text()
    )
    return content


def _changed_settings(optimiser: Any) -> dict[str, Any]:
    """Return the settings of an optimiser that differ from the YAML file with its class's name."""
    if not isinstance(optimiser, Mapping):
        return {}
    target = optimiser.get("_target_")
    name = str(target).rpartition(".")[2].lower()
    is_known = (conf_dir() / "optimiser" / f"{name}.yaml").is_file()
    usual = _optimiser(name) if is_known else {"_target_": target}
    return {
        key: value for key, value in optimiser.items() if key not in usual or usual[key] != value
    }


def _with_defaults(settings: list[Setting], node: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(node)
    for setting in settings:
        if setting.name not in values and setting.default:
            values[setting.name] = setting.default[0]
        kind = nested(setting.kind)
        if kind is not None and isinstance(values.get(setting.name), Mapping):
            values[setting.name] = _with_defaults(settings_of(kind), values[setting.name])
    return values


def check_config(config: DictConfig) -> RunConfig:
    """Check a configuration and return it as dataclasses; components keep their settings as dicts.

    Raises:
        UserError: For an unknown key, a wrong type, a missing value or one out of bounds.
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
    run = conform(own, plain, "")
    for key, value in run.items():
        if key == "optimiser":
            parts["optimiser"] = OmegaConf.to_container(value)
        else:
            parts[str(key)] = OmegaConf.to_object(value) if isinstance(value, DictConfig) else value
    _check_names(run)
    for name in COMPONENTS:
        node = resolved.get(name)
        settings = component_settings(node, name)
        values = OmegaConf.create({key: value for key, value in node.items() if key != "_target_"})
        content: Any = OmegaConf.to_container(conform(settings, values, f"{name}."))
        parts[name] = {"_target_": node["_target_"], **content}
    return RunConfig(**parts)


def _check_names(run: DictConfig) -> None:
    """Check the names of losses and augmentations; plugins can add some."""
    given = [("loss.name", run.loss.name, "loss"), ("loss.inner", run.loss.inner, "loss")]
    for part, group in (("ops", "augment"), ("support", "augment"), ("mix", "mix")):
        for name, own in run.augment[part].items():
            if not (isinstance(own, Mapping) and "_target_" in own):
                given.append((f"augment.{part}", str(name), group))
    for where, name, group in given if not plugins.packages() else []:
        known = names(group)
        if name is not None and "." not in name and name not in known:
            raise plugins.no_such_name(name, known, where)
    optimiser = str(run.optimiser.get("_target_"))
    if (known := optimiser_names()) and optimiser not in known:
        raise no_such_optimiser(optimiser, known)


def optimiser_names() -> list[str]:
    """Return `torch.optim.…` of all optimisers, without importing torch; [] if that fails."""
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations if spec else None) or []:
        if (file := Path(folder, "optim", "__init__.py")).is_file():
            pattern = r"^from torch\.optim\.\w+ import (\w+) as \1$"
            found = re.findall(pattern, file.read_text(), re.M)
            return [f"torch.optim.{name}" for name in found if name != "Optimizer"]
    return []


def no_such_optimiser(target: str, known: list[str]) -> UserError:
    """Return the error for an unknown optimiser."""
    return UserError(
        f"optimiser._target_={target}: should name an optimiser of torch, like "
        f"torch.optim.AdamW{nearest(target, known)}"
    )


def plain(settings: RunConfig) -> dict[str, Any]:
    """Return a checked configuration as plain data."""
    return dataclasses.asdict(settings)


def _schema(settings: list[Setting]) -> DictConfig:
    """Return settings as an OmegaConf schema in which every value is missing."""
    fields = [(setting.name, setting.kind) for setting in settings]
    return OmegaConf.structured(dataclasses.make_dataclass("Settings", fields))


def _kinds(settings: list[Setting], where: str = "") -> dict[str, Any]:
    """Return the type of each setting by its dotted name."""
    kinds: dict[str, Any] = {}
    for setting in settings:
        kind = nested(setting.kind)
        name = f"{where}{setting.name}"
        if kind is setting.kind and kind is not None:
            kinds |= _kinds(settings_of(kind), f"{name}.")
        else:
            kinds[name] = setting.kind
    return kinds


def conform(settings: list[Setting], values: DictConfig, where: str) -> DictConfig:
    """Return values converted to the types of their settings.

    Args:
        settings: All settings that there are; each must have a value.
        values: Values by name.
        where: Prefix of the names in messages.

    Raises:
        UserError: For an unknown key, a wrong type, a missing value or one out of bounds.
    """
    known = _kinds(settings)
    for key in list(leaves(values)):
        value = OmegaConf.select(values, key)
        if isinstance(value, float) and known.get(key) in _WHOLE and value.is_integer():
            OmegaConf.update(values, key, int(value))  # written like 1e3
        if inside := [name for name in known if name.startswith(f"{key}.")]:
            raise UserError(f"{where}{key}: should hold settings, like {where}{inside[0]}")
        if not any(key == name or key.startswith(f"{name}.") for name in known):
            hint = nearest(where + key, [where + name for name in known])
            raise UserError(f"{where}{key}: there is no such setting{hint}")
    merged: Any = _schema(settings)
    for key in map(str, values):  # one at a time, so that the error can name the key
        if OmegaConf.is_missing(values, key):
            raise UserError(f"{where}{key}: has no value")
        try:
            merged.merge_with({key: values[key]})
        except OverflowError:
            raise UserError(f"{where}{key}: has too large a number") from None
        except OmegaConfBaseException as error:
            full = getattr(error, "full_key", None) or str(key)
            given = OmegaConf.select(values, full, default=values[key])
            raise UserError(f"{where}{full}={given}: {_reason(error)}") from None
    if missing := sorted(OmegaConf.missing_keys(merged)):
        raise UserError(f"{where}{missing[0]}: has no value")
    _check_bounds(settings, merged, where)
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
    for text, reason in _REASONS.items():
        if text in line:
            return reason
    match = re.search(r"could not be converted to (\w+)|'None' for field of type '(\w+)'", line)
    if match:
        name = match[1] or match[2]
        return f"should be {_TYPE_NAMES.get(name, name)}"
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
            hint = nearest(str(value), rule["choices"])
            raise UserError(f"{name}={value}: should be one of {', '.join(rule['choices'])}{hint}")
        for number in value if OmegaConf.is_list(value) else [value]:
            if OmegaConf.is_config(number):
                raise UserError(f"{name}={value}: should be a list of numbers")
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
