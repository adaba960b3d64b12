"""Check a composed configuration against the schema.

A mistake raises UserError: what is wrong, where it was set, what would be right.
"""

import dataclasses
import functools
import importlib.util
import operator
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf, nodes
from omegaconf.errors import OmegaConfBaseException

from metalearn.config import plugins
from metalearn.config.components import (
    Setting,
    component_settings,
    conf_dir,
    names,
    nested,
    settings_of,
)
from metalearn.config.schema import COMPONENTS, AugmentConfig, LossConfig, RunConfig
from metalearn.system.errors import UserError, first_line, nearest

#: What converts a value to each type, and the type as a user would say it.
_TYPES: dict[type, tuple[nodes.ValueNode, str]] = {
    int: (nodes.IntegerNode(), "a whole number"),
    float: (nodes.FloatNode(), "a number"),
    bool: (nodes.BooleanNode(), "true or false"),
    str: (nodes.StringNode(), "text"),
}
#: Bounds in the rule of a setting: how a number compares with them, and in words.
_BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "minimum": (operator.ge, "at least"),
    "maximum": (operator.le, "at most"),
    "above": (operator.gt, "greater than"),
}


def complete(plain: dict[str, Any], is_strict: bool = True) -> dict[str, Any]:
    """Add the defaults of settings that a configuration lacks, as runs of older versions do.

    If not `is_strict`, the settings of an unknown class stay as they are, else it is an error.
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
    plain.pop("reproduction", None)  # of an earlier version
    logger = plain.get("logger")
    if isinstance(logger, Mapping) and "name" in logger:
        own = {key: value for key, value in logger.items() if key != "name"}
        wandb = {"_target_": "metalearn.report.wandb_run.WandbRun", **own}
        plain["logger"] = {"wandb": wandb} if logger["name"] == "wandb" else {}
    for name in COMPONENTS:
        node = plain.get(name)
        if isinstance(node, Mapping) and "_target_" in node:
            plain[name] = _with_defaults(component_settings(node, name, is_strict), node)
    return _with_defaults(settings_of(RunConfig), plain)


@functools.cache
def _optimiser(name: str) -> dict[str, Any]:
    """Return the content of the YAML file of an optimiser, or {}."""
    path = conf_dir() / "optimiser" / f"{name}.yaml"
    content: dict[str, Any] = yaml.safe_load(path.read_text()) if path.is_file() else {}
    return content


def _changed_settings(optimiser: Any) -> dict[str, Any]:
    """Return the settings of an optimiser that differ from the YAML file with its class's name."""
    if not isinstance(optimiser, Mapping):
        return {}
    target = optimiser.get("_target_")
    usual = {"_target_": target} | _optimiser(str(target).rpartition(".")[2].lower())
    return {key: own for key, own in optimiser.items() if key not in usual or usual[key] != own}


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
        cause: BaseException | None = error
        while cause and not isinstance(cause, UserError):  # a resolver's
            cause = cause.__cause__ or cause.__context__
        raise UserError(str(cause or first_line(error))) from None
    resolved = complete(resolved)
    own = [setting for setting in settings_of(RunConfig) if setting.name not in COMPONENTS]
    values = {key: value for key, value in resolved.items() if key not in COMPONENTS}
    parts = conform(own, values, "")
    _check_names(parts["loss"], parts["augment"], str(parts["optimiser"].get("_target_")))
    for name in COMPONENTS:
        parts[name] = _component(resolved.get(name), name)
    return RunConfig(**parts)


def _component(node: Any, where: str) -> dict[str, Any]:
    """Return the settings of a component, converted to their types, with its `_target_`."""
    settings = component_settings(node, where)
    values = {key: value for key, value in node.items() if key != "_target_"}
    checked = conform(settings, _with_defaults(settings, values), f"{where}.")
    return {"_target_": node["_target_"], **checked}


def _check_names(loss: LossConfig, augment: AugmentConfig, optimiser: str) -> None:
    """Check the names of losses and augmentations; plugins can add some."""
    given = [("loss.name", loss.name, "loss"), ("loss.inner", loss.inner, "loss")]
    for part, group in (("ops", "augment"), ("support", "augment"), ("mix", "mix")):
        for name, own in getattr(augment, part).items():
            if not (isinstance(own, Mapping) and "_target_" in own):
                given.append((f"augment.{part}", str(name), group))
    for where, name, group in given if not plugins.packages() else []:
        known = names(group)
        if name is not None and "." not in name and name not in known:
            raise plugins.no_such_name(name, known, where)
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


def leaves(node: Mapping[Any, Any], where: str = "") -> dict[str, Any]:
    """Return all values of a configuration by their dotted names; {} counts as a value."""
    values: dict[str, Any] = {}
    plain: Any = OmegaConf.to_container(node) if isinstance(node, DictConfig) else node
    for key, value in plain.items():
        is_inner = isinstance(value, Mapping) and value
        values |= leaves(value, f"{where}{key}.") if is_inner else {f"{where}{key}": value}
    return values


def _names(settings: list[Setting]) -> list[str]:
    """Return the dotted names of settings, and of those inside them instead of their groups."""
    names = []
    for setting in settings:
        kind = nested(setting.kind)
        inner = [f".{name}" for name in _names(settings_of(kind))] if kind else [""]
        names += [setting.name + name for name in inner]
    return names


def conform(settings: list[Setting], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return values converted to the types of their settings; groups become dataclasses.

    Each setting must have a value, and each value a setting. `where` is the prefix of the names in
    messages. Raise UserError for an unknown key, a wrong type, or a value out of bounds.
    """
    known = _names(settings)
    for key, value in leaves(values).items():
        inside = [name for name in known if name.startswith(f"{key}.")]
        if inside and value is not None:
            raise UserError(f"{where}{key}: should hold settings, like {where}{inside[0]}")
        if not inside and not any(key == name or key.startswith(f"{name}.") for name in known):
            hint = nearest(where + key, [where + name for name in known])
            raise UserError(f"{where}{key}: there is no such setting{hint}")
    converted = {}
    for setting in settings:
        name, value = f"{where}{setting.name}", values.get(setting.name, MISSING)
        if value == MISSING:
            raise UserError(f"{name}: has no value")
        converted[setting.name] = _converted(value, setting.kind, name)
        if "components" in setting.rule:
            converted[setting.name] = {
                key: _component(one, f"{name}.{key}")
                for key, one in converted[setting.name].items()
            }
        _check_bounds(converted[setting.name], setting.rule, name)
    return converted


def _converted(value: Any, kind: Any, name: str) -> Any:
    """Return a value as one of a type; raise UserError if that is impossible."""
    if isinstance(kind, types.UnionType):
        if value is None and types.NoneType in typing.get_args(kind):
            return None
        kinds = [one for one in typing.get_args(kind) if one is not types.NoneType]
        is_list = isinstance(value, list | tuple)
        fitting = [one for one in kinds if (typing.get_origin(one) is list) == is_list]
        kind = (fitting or kinds)[0]
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        if isinstance(value, str) and arguments[0] is str:
            value = [value]  # one name
        if not isinstance(value, list | tuple):
            raise UserError(f"{name}={value}: should be a list")
        if any(isinstance(one, list | dict) for one in value):
            raise UserError(f"{name}={value}: should be a list of numbers")
        return [_converted(one, arguments[0], f"{name}[{at}]") for at, one in enumerate(value)]
    if origin is dict or dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise UserError(f"{name}={value}: should hold settings")
        if origin is not dict:
            return kind(**conform(settings_of(kind), value, f"{name}."))
        return {str(k): _converted(one, arguments[1], f"{name}.{k}") for k, one in value.items()}
    node, words = _TYPES[kind]
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # written like 1e3
    try:
        if value is not None:
            return node.validate_and_convert(value)
    except OverflowError:
        raise UserError(f"{name}: has too large a number") from None
    except OmegaConfBaseException:
        pass
    raise UserError(f"{name}={value}: should be {words}")


def _check_bounds(value: Any, rule: Mapping[str, Any], name: str) -> None:
    if value is None:
        return
    if "choices" in rule and value not in rule["choices"]:
        hint = nearest(str(value), rule["choices"])
        raise UserError(f"{name}={value}: should be one of {', '.join(rule['choices'])}{hint}")
    is_range = rule.get("is_range") and isinstance(value, list)
    if is_range and (len(value) != 2 or value[0] > value[1]):
        raise UserError(
            f"{name}={value}: should be a number, or a range [low,high] with low <= high"
        )
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, float) and number != number:
            raise UserError(f"{name}={value}: should be a number")
        for bound, (holds, words) in _BOUNDS.items():
            if bound in rule and not holds(number, rule[bound]):
                raise UserError(f"{name}={value}: should be {words} {rule[bound]}")
        if isinstance(number, int) and not -(2**31) <= number < 2**31:
            raise UserError(f"{name}={value}: is too large a number")
