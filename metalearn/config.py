"""The typed schema of all of `conf/`: a composed configuration becomes a checked one.

A mistake raises `UserError`: what is wrong, where it was said, what would be right.
"""

import dataclasses
import difflib
import importlib
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metalearn.errors import UserError, first_line
from metalearn.settings import above, at_least, between, choice


@dataclasses.dataclass(kw_only=True)
class EpisodeShape:
    way: int = at_least(1)
    shot: int = at_least(1)
    query: int = at_least(1)


@dataclasses.dataclass(kw_only=True)
class EpisodeConfig(EpisodeShape):
    train: EpisodeShape


@dataclasses.dataclass(kw_only=True)
class TrainConfig:
    source: str = choice("episodes", "batches")
    batch_size: int = at_least(1)
    steps: int = at_least(0)
    meta_batch: int = at_least(1)
    optimiser: str = choice("adam", "sgd")
    lr: float = above(0)
    schedule: str = choice("constant", "linear", "cosine", "step")
    schedule_every: int = at_least(1)
    schedule_factor: float = above(0)
    clip_value: float | None = above(0)
    clip_norm: float | None = above(0)
    statistics_momentum: float = between(0, 1)
    log_every: int = at_least(1)
    patience: int = at_least(0)
    nonfinite: str = choice("stop", "skip")


@dataclasses.dataclass(kw_only=True)
class ValConfig:
    every: int = at_least(1)
    episodes: int = at_least(2)


@dataclasses.dataclass(kw_only=True)
class TestConfig:
    __test__ = False  # not a test class for pytest

    episodes: int = at_least(2)


@dataclasses.dataclass(kw_only=True)
class CheckpointConfig:
    every: int = at_least(1)


@dataclasses.dataclass(kw_only=True)
class EngineConfig:
    strategy: str = choice("auto", "vmap", "loop", "mixed")
    task_chunk: int = at_least(0)
    threads: int = at_least(0)
    precision: str = choice("fp32", "tf32", "bf16")
    convolution: str = choice("auto", "plain", "unfold")
    cuda_graph: bool
    rematerialise: bool
    profile: bool
    choices: str | None


@dataclasses.dataclass(kw_only=True)
class LoggerConfig:
    name: str = choice("wandb", "none")
    project: str | None
    entity: str | None


@dataclasses.dataclass(kw_only=True)
class PublishedConfig:
    """A published figure: score, half-width of its 95% interval where given, and where it was read."""

    mean: float
    ci95: float | None
    source: str


@dataclasses.dataclass(kw_only=True)
class MeasuredConfig:
    """What this recipe gave here at one budget, and where."""

    mean: float
    ci95: float
    minutes: float
    hardware: str
    commit: str | None
    seed: int
    protocol_id: str


@dataclasses.dataclass(kw_only=True)
class ReproductionConfig:
    """What `metalearn reproduce` reads. budgets: the overrides of each; measured: by budget."""

    published: PublishedConfig
    budgets: dict[str, list[str]]
    measured: dict[str, MeasuredConfig]


@dataclasses.dataclass(kw_only=True)
class RunConfig:
    """`algo`, `dataset` and `backbone` are checked against the class that their `_target_` names."""

    algo: Any
    dataset: Any
    backbone: Any
    episode: EpisodeConfig
    logger: LoggerConfig
    train: TrainConfig
    val: ValConfig
    test: TestConfig
    checkpoint: CheckpointConfig
    engine: EngineConfig
    seed: int
    episode_seed: int
    statistics: str = choice("query", "support", "support_plus_one", "population")
    device: str = choice("auto", "cpu", "cuda")
    data_dir: str | None
    cache_dir: str | None
    resume: str = choice("never", "auto")
    reproduction: ReproductionConfig | None


COMPONENTS = ("algo", "dataset", "backbone")
#: Where the classes of each group live, and a method that they all have.
_HOMES = {"algo": ("algorithms", "adapt"), "dataset": ("data", "open"), "backbone": ("backbones", "embed")}


def component(node: Any, where: str) -> Any:
    """The class a group's `_target_` names; only classes of this package may be named."""
    target = node.get("_target_") if isinstance(node, Mapping) else None
    home, method = _HOMES[where]
    if not isinstance(target, str) or not re.fullmatch(rf"metalearn\.{home}\.\w+\.\w+", target):
        raise UserError(f"{where}._target_={target}: should name a class in metalearn.{home}")
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise UserError(f"{where}._target_={target}: there is no such class") from None
    if not (isinstance(found, type) and dataclasses.is_dataclass(found) and hasattr(found, method)):
        raise UserError(f"{where}._target_={target}: is no class for {where}")
    return found


def checked(config: DictConfig) -> RunConfig:
    """The configuration as typed dataclasses; components keep their plain settings as dicts.

    Raises: UserError for an unknown key, a wrong type, a missing value or one out of bounds.
    """
    try:
        resolved: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(first_line(error)) from None
    plain = OmegaConf.create({key: value for key, value in resolved.items() if key not in COMPONENTS})
    run = _conform(
        _structured(RunConfig, without=COMPONENTS), plain, "", [n for n in _names(RunConfig) if n not in COMPONENTS]
    )
    _check_bounds(RunConfig, run, "")
    parts: dict[str, Any] = {
        str(key): OmegaConf.to_object(value) if isinstance(value, DictConfig) else value for key, value in run.items()
    }
    for name in COMPONENTS:
        node = resolved.get(name)
        cls = component(node, name)
        values = OmegaConf.create({key: value for key, value in node.items() if key != "_target_"})
        typed = _conform(_structured(cls), values, f"{name}.", _names(cls))
        _check_bounds(cls, typed, f"{name}.")
        settings: Any = OmegaConf.to_container(typed)
        parts[name] = {"_target_": node["_target_"], **settings}
    return RunConfig(**parts)


def make(settings: dict[str, Any], where: str, **runtime: Any) -> Any:
    """The component that checked settings describe, completed with its run-time objects."""
    values = {key: value for key, value in settings.items() if key != "_target_"}
    cls = component(settings, where)
    wanted = {field.name for field in dataclasses.fields(cls) if "runtime" in field.metadata}
    return cls(**values, **{key: value for key, value in runtime.items() if key in wanted})


def _structured(cls: type, without: tuple[str, ...] = ()) -> DictConfig:
    """The settings of a dataclass as an OmegaConf schema, all of them missing yet."""
    hints = typing.get_type_hints(cls)
    fields = [
        (field.name, hints[field.name])
        for field in dataclasses.fields(cls)
        if "runtime" not in field.metadata and field.name not in without
    ]
    return OmegaConf.structured(dataclasses.make_dataclass(cls.__name__, fields))


def _names(cls: type, where: str = "") -> list[str]:
    """Dotted names of all settings of a dataclass."""
    hints = typing.get_type_hints(cls)
    names = []
    for field in dataclasses.fields(cls):
        name, hint = f"{where}{field.name}", hints[field.name]
        if "runtime" not in field.metadata:
            names += _names(hint, f"{name}.") if dataclasses.is_dataclass(hint) else [name]  # type: ignore[arg-type]
    return names


def _conform(schema: DictConfig, values: DictConfig, where: str, known: list[str]) -> DictConfig:
    for key in leaves(values):
        if inside := [name for name in known if name.startswith(f"{key}.")]:
            raise UserError(f"{where}{key}: should hold settings, like {where}{inside[0]}")
        if not any(key == name or key.startswith(f"{name}.") for name in known):
            raise UserError(
                f"{where}{key}: nothing reads this key{nearest(where + key, [where + name for name in known])}"
            )
    merged: Any = schema
    for key in map(str, values):  # one at a time, so that an error can say which
        if OmegaConf.is_missing(values, key):
            raise UserError(f"{where}{key}: has no value")
        try:
            merged = OmegaConf.merge(merged, {key: values[key]})
        except OmegaConfBaseException as error:
            full = getattr(error, "full_key", None) or str(key)
            given = OmegaConf.select(values, full, default=values[key])
            raise UserError(f"{where}{full}={given}: {_reason(error)}") from None
    if missing := sorted(OmegaConf.missing_keys(merged)):
        raise UserError(f"{where}{missing[0]}: has no value")
    return merged


def leaves(node: DictConfig, where: str = "") -> Iterator[str]:
    """Dotted names of all values of a configuration."""
    for key in map(str, node):
        if not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig) and len(node[key]):
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


def _check_bounds(cls: type, values: DictConfig, where: str) -> None:
    for field in dataclasses.fields(cls):
        if field.name not in values:
            continue
        value, rule = values[field.name], field.metadata
        name = f"{where}{field.name}"
        if isinstance(value, DictConfig):
            nested = typing.get_type_hints(cls)[field.name]
            if dataclasses.is_dataclass(nested):
                _check_bounds(nested, value, f"{name}.")  # type: ignore[arg-type]
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


def nearest(word: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
