"""The typed schema of all of `conf/`, and how a command line becomes a checked configuration.

A mistake raises `UserError`: what is wrong, where it was said, what would be right.
"""

import contextlib
import dataclasses
import difflib
import importlib
import itertools
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metalearn.errors import UserError
from metalearn.settings import above, at_least, between, choice

_PACKAGE = Path(__file__).parent


def conf_dir() -> Path:
    """Where `conf/` lies: inside an installed package, or beside it in a checkout."""
    inside = _PACKAGE / "conf"
    return inside if inside.is_dir() else _PACKAGE.parent / "conf"


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


@dataclasses.dataclass(kw_only=True)
class LoggerConfig:
    name: str = choice("wandb", "none")
    project: str | None
    entity: str | None


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
    data_dir: str
    cache_dir: str


COMPONENTS = ("algo", "dataset", "backbone")


def component(node: Any, where: str) -> type:
    """The class a group's `_target_` names; only classes of this package may be named."""
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    if not isinstance(target, str) or not re.fullmatch(r"metalearn(\.\w+)+", target):
        raise UserError(f"{where}._target_={target}: should name a class of this package, like metalearn.….{where.title()}")
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise UserError(f"{where}._target_={target}: there is no such class") from None
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise UserError(f"{where}._target_={target}: is not a dataclass of settings")
    return found


def checked(config: DictConfig) -> RunConfig:
    """The configuration as typed dataclasses; components keep their plain settings as dicts.

    Raises: UserError for an unknown key, a wrong type, a missing value or one out of bounds.
    """
    try:
        config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(_first_line(error)) from None
    parts = {name: config.get(name) for name in COMPONENTS}
    plain = OmegaConf.create({key: value for key, value in config.items() if key not in COMPONENTS})
    run = _conform(_structured(RunConfig, without=COMPONENTS), plain, "")
    _check_bounds(RunConfig, run, "")
    settings = {}
    for name, node in parts.items():
        cls = component(node, name)
        values = OmegaConf.create({key: value for key, value in node.items() if key != "_target_"})
        typed = _conform(_structured(cls), values, f"{name}.")
        _check_bounds(cls, typed, f"{name}.")
        settings[name] = {"_target_": node["_target_"], **OmegaConf.to_container(typed)}
    typed_run = {key: OmegaConf.to_object(value) if isinstance(value, DictConfig) else value for key, value in run.items()}
    return RunConfig(**typed_run, **settings)


def make(settings: dict[str, Any], where: str, **runtime: Any) -> Any:
    """The component that checked settings describe, completed with its run-time objects."""
    values = {key: value for key, value in settings.items() if key != "_target_"}
    cls = component(OmegaConf.create(settings), where)
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


def _conform(schema: DictConfig, values: DictConfig, where: str) -> DictConfig:
    known = [key for key, _ in _leaves(schema, "")]
    for key, _ in _leaves(values, ""):
        if not any(key == name or key.startswith(f"{name}.") for name in known):
            raise UserError(f"{where}{key}: nothing reads this key{_nearest(where + key, [where + name for name in known])}")
    merged = schema
    for key in values:  # one at a time, so that an error can say which
        try:
            merged = OmegaConf.merge(merged, {key: values[key]})
        except OmegaConfBaseException as error:
            full = getattr(error, "full_key", None) or str(key)
            given = OmegaConf.select(values, full, default=values[key])
            raise UserError(f"{where}{full}={given}: {_reason(error)}") from None
    if missing := sorted(OmegaConf.missing_keys(merged)):
        raise UserError(f"{where}{missing[0]}: has no value")
    return merged


def _leaves(node: DictConfig, where: str) -> Iterator[tuple[str, Any]]:
    for key in node:
        missing = OmegaConf.is_missing(node, key)
        if not missing and isinstance(node[key], DictConfig) and len(node[key]):
            yield from _leaves(node[key], f"{where}{key}.")
        else:
            yield f"{where}{key}", None if missing else node[key]


def _reason(error: Exception) -> str:
    line = _first_line(error)
    if found := re.search(r"could not be converted to (\w+)", line):
        kind = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}.get(found[1], found[1].lower())
        return f"should be {kind}"
    return line


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


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
            raise UserError(f"{name}={value}: should be one of {', '.join(rule['choices'])}{_nearest(str(value), rule['choices'])}")
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


def _nearest(word: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


# Composition by Hydra, its errors in one line.


@contextlib.contextmanager
def _hydra_errors(overrides: list[str]) -> Iterator[None]:
    from hydra.errors import HydraException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_translated(error, overrides)) from None


def _translated(error: Exception, overrides: list[str]) -> str:
    text = str(error)
    if found := re.search(r"Could not find '([^'/]+(?:/[^'/]+)*)/([^'/]+)'", text):
        group, name = found[1], found[2]
        known = options(group)
        return f"{group}={name}: there is no such {group}; there are {', '.join(known)}{_nearest(name, known)}"
    if found := re.search(r"Could not override '([^']+)'", text):
        key = found[1].lstrip("+~")
        if "No match in the defaults list" in text:
            return f"{key}: there is no such group{_nearest(key, groups())}"
        with initialised() as compose:
            known = [name for name, _ in _leaves(compose([]), "")]
        return f"{key}: there is no such key{_nearest(key, [*known, *groups()])}"
    return f"{_first_line(error)} (in: {' '.join(overrides)})"


@contextlib.contextmanager
def initialised() -> Iterator[Any]:
    """Hydra's compose for the entry point in `conf/`."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="metalearn"):
        yield lambda overrides, **options: compose("config", overrides=overrides, **options)


def composed(overrides: list[str], with_hydra: bool = False) -> DictConfig:
    """The composed configuration. Raises: UserError naming the word that is wrong, and the nearest right one."""
    with _hydra_errors(overrides), initialised() as compose:
        return compose(overrides, return_hydra_config=with_hydra)


def changed(stored: DictConfig, overrides: list[str]) -> DictConfig:
    """A stored configuration with plain `key=value` overrides, or another data set by its name."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    result = OmegaConf.create(OmegaConf.to_container(stored))
    known = [name for name, _ in _leaves(stored, "")]
    with _hydra_errors(overrides):
        parsed = OverridesParser.create().parse_overrides(overrides)
    for override in parsed:
        key, value = override.key_or_group, override.value()
        if key == "dataset":
            result.dataset = composed([f"dataset={value}"]).dataset
        elif override.is_sweep_override() or OmegaConf.select(stored, key, default=key) == key:
            raise UserError(f"{override.input_line}: there is no such key{_nearest(key, known)}")
        else:
            OmegaConf.update(result, key, value)
    return result


def combinations(overrides: list[str]) -> list[list[str]]:
    """Every run of a multirun, as plain overrides; search ranges (for sweepers with a strategy) are left out."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with _hydra_errors(overrides):
        parsed = OverridesParser.create().parse_overrides(overrides)
        axes = []
        for override in parsed:
            if not override.is_sweep_override():
                axes.append([override.input_line])
            elif override.is_discrete_sweep():
                key = override.get_key_element()
                axes.append([f"{key}={value}" for value in override.sweep_string_iterator()])
    return [list(run) for run in itertools.product(*axes)]


def groups() -> list[str]:
    """Names of the configuration groups."""
    return sorted(path.name for path in conf_dir().iterdir() if path.is_dir() and path.name != "hydra")


def options(group: str) -> dict[str, str]:
    """The choices of a group, each with the first comment line of its file."""
    found = {}
    for path in sorted((conf_dir() / group).glob("*.yaml")):
        comments = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
        found[path.stem] = next((line for line in comments if not line.startswith("@package")), "")
    return found
