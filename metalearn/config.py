"""The typed schema of all of `conf/`: a composed configuration becomes a checked one.

A mistake raises `UserError`: what is wrong, where it was set, what would be right. Nothing here imports torch: the settings of
the package's own classes are in a generated index, so that a mistyped word is answered at once.
"""

import dataclasses
import functools
import importlib
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metalearn import plugins
from metalearn.errors import UserError, first_line, nearest
from metalearn.settings import above, anything, at_least, between, choice

_PACKAGE = Path(__file__).parent
#: Settings of the package's own components; written by scripts/settings_index.py.
INDEX_FILE = _PACKAGE / "settings_index.json"


@dataclasses.dataclass(kw_only=True)
class EpisodeShape:
    """The shape of episodes; see `metalearn.tasks.sampling.Shape`."""

    way: int = at_least(1)
    shot: int = at_least(1)
    query: int = at_least(1)
    unlabelled: int = at_least(0, default=0)
    distractors: int = at_least(0, default=0)


@dataclasses.dataclass(kw_only=True)
class EpisodeConfig(EpisodeShape):
    """Episodes of validation and test, and of training."""

    train: EpisodeShape = anything(role="identity")


@dataclasses.dataclass(kw_only=True)
class TrainConfig:
    """Meta-training; conf/base.yaml explains each setting."""

    source: str = choice("episodes", "batches")
    batch_size: int = at_least(1)
    steps: int = at_least(0)
    meta_batch: int = at_least(1)
    optimiser: str | None = choice("adam", "sgd", default=None)
    lr: float = above(0)
    schedule: str = choice("constant", "linear", "cosine", "step")
    schedule_every: int = at_least(1)
    schedule_factor: float = above(0)
    clip_value: float | None = above(0)
    clip_norm: float | None = above(0)
    statistics_momentum: float = between(0, 1)
    log_every: int = at_least(1, role="presentation")
    patience: int = at_least(0)
    nonfinite: str = choice("stop", "skip", role="machine")


@dataclasses.dataclass(kw_only=True)
class ValConfig:
    """Validation."""

    every: int = at_least(1)
    episodes: int = at_least(2)


@dataclasses.dataclass(kw_only=True)
class TestConfig:
    """The test."""

    __test__ = False  # not a test class for pytest

    episodes: int = at_least(2)


@dataclasses.dataclass(kw_only=True)
class CheckpointConfig:
    """Checkpoints."""

    every: int = at_least(1)


@dataclasses.dataclass(kw_only=True)
class EngineConfig:
    """How it is computed; conf/base.yaml explains each setting."""

    strategy: str = choice("auto", "vmap", "loop", "mixed", rounds=True)
    task_chunk: int = at_least(0)
    threads: int = at_least(0, rounds=True)
    precision: str = choice("fp32", "tf32", "bf16", rounds=True)
    convolution: str = choice("auto", "plain", "unfold", rounds=True)
    cuda_graph: bool = anything(default=True)
    rematerialise: bool = anything(rounds=True)
    profile: bool = anything()
    choices: str | None = anything(rounds=True)


@dataclasses.dataclass(kw_only=True)
class LoggerConfig:
    """Where metrics go besides the run folder."""

    name: str = choice("wandb", "none")
    project: str | None = anything()
    entity: str | None = anything()


@dataclasses.dataclass(kw_only=True)
class LossConfig:
    """Losses by name, null for the usual ones: of queries and batches, and of inner loops. settings: of `name`."""

    name: str | None = anything(default=None)
    inner: str | None = anything(default=None)
    settings: dict[str, Any] = anything(default={})


@dataclasses.dataclass(kw_only=True)
class AugmentConfig:
    """Augmentations of training inputs, applied in this order: name -> its settings."""

    ops: dict[str, Any] = anything(default={})


@dataclasses.dataclass(kw_only=True)
class PublishedConfig:
    """A published result: its mean, the half-width of its 95% interval where given, and where it was read."""

    mean: float = anything()
    ci95: float | None = anything()
    source: str = anything()


@dataclasses.dataclass(kw_only=True)
class MeasuredConfig:
    """What a recipe gave here at one budget, and where. sampler: version of the episode sampler."""

    mean: float = anything()
    ci95: float = anything()
    minutes: float = anything()
    hardware: str = anything()
    commit: str | None = anything()
    seed: int = anything()
    protocol_id: str = anything()
    sampler: int = anything(default=1)


@dataclasses.dataclass(kw_only=True)
class ReproductionConfig:
    """What `metalearn reproduce` reads. budgets: the overrides of each; measured: by budget."""

    published: PublishedConfig = anything()
    budgets: dict[str, list[str]] = anything()
    measured: dict[str, MeasuredConfig] = anything()


@dataclasses.dataclass(kw_only=True)
class RunConfig:
    """`algo`, `dataset` and `backbone` are checked against the class that their `_target_` names."""

    algo: Any = anything(role="identity protocol")
    dataset: Any = anything(role="identity protocol")
    backbone: Any = anything(role="identity")
    optimiser: dict[str, Any] = anything(role="identity")
    loss: LossConfig = anything(role="identity")
    augment: AugmentConfig = anything(role="identity")
    episode: EpisodeConfig = anything(role="identity protocol")
    logger: LoggerConfig = anything(role="presentation")
    train: TrainConfig = anything(role="identity")
    val: ValConfig = anything(role="identity")
    test: TestConfig = anything(role="protocol")
    checkpoint: CheckpointConfig = anything(role="machine")
    engine: EngineConfig = anything(role="machine")
    seed: int = anything(role="seed")
    episode_seed: int = anything(role="identity protocol")
    statistics: str = choice(
        "query", "support", "support_plus_one", "population", role="identity protocol"
    )
    device: str = choice("auto", "cpu", "cuda", role="machine", rounds=True)
    data_dir: str | None = anything(role="machine")
    cache_dir: str | None = anything(role="machine")
    resume: str = choice("never", "auto", role="presentation")
    reproduction: ReproductionConfig | None = anything(default=None, role="presentation")


COMPONENTS = ("algo", "dataset", "backbone")
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


def _known_settings(node: Any, where: str, is_strict: bool) -> list[Setting]:
    try:
        return component_settings(node, where)
    except UserError:
        if is_strict:
            raise
        return []


def roles(plain: Mapping[str, Any], is_strict: bool = True) -> dict[str, Setting]:
    """Return the setting that each value of a complete configuration belongs to, by its dotted name.

    The rule of each has the role that holds for it: its own, or that of the group around it.
    """
    described: dict[str, Setting] = {}

    def walk(settings: list[Setting], node: Mapping[str, Any], where: str, role: str) -> None:
        for setting in settings:
            value, name = node.get(setting.name), f"{where}{setting.name}"
            own = str(setting.rule.get("role") or role)
            nested = _nested(setting.kind)
            if where == "" and setting.name in COMPONENTS:
                walk(_known_settings(value, setting.name, is_strict), value or {}, f"{name}.", own)
                described[f"{name}._target_"] = Setting("_target_", str, {"role": "identity"})
            elif nested is not None and isinstance(value, Mapping):
                walk(settings_of(nested), value, f"{name}.", own)
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


def _nested(kind: Any) -> type | None:
    """Return the dataclass that a setting's type is, perhaps with None, or None."""
    parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return next(
        (one for one in parts if isinstance(one, type) and dataclasses.is_dataclass(one)), None
    )


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
            plain[name] = _completed(_known_settings(node, name, is_strict), node)
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
        nested = _nested(setting.kind)
        if nested is not None and isinstance(values.get(setting.name), Mapping):
            values[setting.name] = _completed(settings_of(nested), values[setting.name])
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


def make(settings: dict[str, Any], where: str, **runtime: Any) -> Any:
    """Return the component that checked settings describe, completed with its run-time objects."""
    values = {key: value for key, value in settings.items() if key != "_target_"}
    cls = component(settings, where)
    wanted = {field.name for field in dataclasses.fields(cls) if "runtime" in field.metadata}
    return cls(**values, **{key: value for key, value in runtime.items() if key in wanted})


def _schema(settings: list[Setting]) -> DictConfig:
    """Return settings as an OmegaConf schema, all of them missing yet."""
    fields = [(setting.name, setting.kind) for setting in settings]
    return OmegaConf.structured(dataclasses.make_dataclass("Settings", fields))


def _names(settings: list[Setting], where: str = "") -> list[str]:
    """Return the dotted names of all settings."""
    names = []
    for setting in settings:
        nested = _nested(setting.kind)
        name = f"{where}{setting.name}"
        names += (
            _names(settings_of(nested), f"{name}.")
            if nested is setting.kind and nested is not None
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
            nested = _nested(setting.kind)
            if nested is not None:
                _check_bounds(settings_of(nested), value, f"{name}.")
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
