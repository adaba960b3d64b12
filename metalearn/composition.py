"""From `conf/` and a command line to one composed configuration, by Hydra; its errors in one line."""

import contextlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from metalearn.config import checked, leaves, nearest
from metalearn.errors import UserError, first_line

_PACKAGE = Path(__file__).parent


def conf_dir() -> Path:
    """Where `conf/` lies: inside an installed package, or beside it in a checkout."""
    inside = _PACKAGE / "conf"
    return inside if inside.is_dir() else _PACKAGE.parent / "conf"


@contextlib.contextmanager
def _hydra_errors(overrides: list[str]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Hydra raises its own, OmegaConf's and plain ValueErrors for a command line it rejects
        raise UserError(_translated(error, overrides)) from None


def _translated(error: Exception, overrides: list[str]) -> str:
    text = str(error)
    if found := re.search(r"Could not find '([^'/]+(?:/[^'/]+)*)/([^'/]+)'", text):
        group, name = found[1], found[2]
        if not (conf_dir() / group).is_dir():
            return f"{group}={name}: there is no such {group}"
        choices = options(group)
        return f"{group}={name}: there is no such {group}; there are {', '.join(choices)}{nearest(name, choices)}"
    if found := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{found[1]}: several values are for a multirun; add -m"
    if found := re.search(r"Could not override '([^']+)'", text):
        key = found[1].lstrip("+~")
        if "No match in the defaults list" in text:
            return f"{key}: there is no such group{nearest(key, groups())}"
        chosen = [word for word in overrides if word.split("=")[0] in groups()]
        try:
            with initialised() as compose:
                known = list(leaves(compose(chosen)))
        except Exception:  # a group is mistyped too: without a suggestion then
            known = []
        return f"{key}: there is no such key{nearest(key, [*known, *groups()])}"
    return f"{first_line(error)} (in: {' '.join(overrides)})"


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


def stored(folder: Path) -> DictConfig:
    """The configuration in a run folder; a setting that is newer than the run has its usual value.

    Raises: UserError where no configuration lies there, or one that this version does not understand.
    """
    path = folder / "config.yaml"
    try:
        found = OmegaConf.load(path)
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not a readable configuration ({first_line(error)})") from None
    if not isinstance(found, DictConfig):
        raise UserError(f"{path} is not a configuration")
    usual = {group: _usual(found, group) for group in ("algo", "backbone")}
    merged: Any = OmegaConf.merge(OmegaConf.load(conf_dir() / "base.yaml"), usual, found)
    try:
        checked(merged)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return merged


def _usual(found: DictConfig, group: str) -> Any:
    """The settings of a stored run's method or backbone as the first file of `conf/` with its class has them, for those that are newer than the run."""
    target = OmegaConf.select(found, f"{group}._target_")
    for path in sorted((conf_dir() / group).glob("*.yaml")):
        file: Any = OmegaConf.load(path)
        usual = file.get(group, file)  # a file may set other groups too
        if target is not None and usual.get("_target_") == target:
            return usual
    return {}


def changed(stored: DictConfig, overrides: list[str]) -> DictConfig:
    """A stored configuration with plain `key=value` overrides, or another data set or episode by its name."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    result: Any = OmegaConf.create(OmegaConf.to_container(stored))
    known = list(leaves(stored))
    with _hydra_errors(overrides):
        parsed = OverridesParser.create().parse_overrides(overrides)
    for override in parsed:
        key, value = override.key_or_group, override.value()
        if key == "dataset":
            result.dataset = composed([f"dataset={value}"]).dataset
        elif key == "episode":  # what is tested; how the run was trained stays
            shape = composed([f"episode={value}"]).episode
            result.episode = OmegaConf.merge(result.episode, {name: shape[name] for name in ("way", "shot", "query")})
        elif override.is_sweep_override():
            raise UserError(f"{override.input_line}: a test has one value for each setting")
        elif OmegaConf.select(stored, key, default=key) == key:
            raise UserError(f"{override.input_line}: there is no such key{nearest(key, known)}")
        else:
            OmegaConf.update(result, key, value)
    return result


def combinations(overrides: list[str]) -> list[list[str]]:
    """Every run of a multirun, as plain overrides; search ranges (for sweepers with a strategy) are left out."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob

    with _hydra_errors(overrides):
        parsed = OverridesParser.create().parse_overrides(overrides)
        axes: list[list[str]] = []
        for override in parsed:
            if not override.is_sweep_override():
                axes.append([str(override.input_line)])
            elif override.is_discrete_sweep() and not isinstance(override.value(), Glob):
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
        found[path.stem] = next((line for line in _comments(path) if not line.startswith("@package")), "")
    return found


def families() -> dict[str, list[str]]:
    """The algorithms of each family, which a comment `# family: …` in their file names; "other" where none does."""
    found: dict[str, list[str]] = {"gradient": [], "metric": [], "memory": [], "transfer": []}
    for name in options("algo"):
        comments = _comments(conf_dir() / "algo" / f"{name}.yaml")
        family = next((line.partition(":")[2].strip() for line in comments if line.startswith("family:")), "other")
        found.setdefault(family, []).append(name)
    return found


def _comments(path: Path) -> list[str]:
    return [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
