"""Compose `conf/` and a command line with Hydra, and report its errors in one line."""

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from metalearn.config import choices, gates, plugins
from metalearn.config.checking import check_config, leaves, plain
from metalearn.config.components import conf_dir
from metalearn.system.errors import UserError, first_line, nearest, prefixed
from metalearn.system.reading import read_yaml


def quoted(text: str) -> str:
    """Quote a value for Hydra's override grammar."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)  # only backslashes before a quote are escapes
    return "'" + re.sub(r"(\\+)\Z", r"\1\1", escaped) + "'"


def _recipe(kind: str, algo: str, *others: str) -> str:
    """Return the name of the recipe of a method for a dataset and a backbone, or "none".

    A method without a recipe uses the first that exists of the methods that a comment
    `# recipes: …` in its file names. Backbone "": the recipe's choice.
    """
    if others[1:] == ("",):
        others = (others[0], _recipe_choice("backbone", "conv4", algo, others[0]))
    names = [algo, *re.findall(r"[^\s,]+", choices.tags("algo", algo).get("recipes", ""))]
    known = ["-".join([name, *others]) for name in names]
    return next(
        (name for name in known if choices.file_of(f"recipe/{kind}", name) is not None), "none"
    )


def _recipe_choice(group: str, default: str, algo: str, dataset: str) -> str:
    """Return the choice of a group that a comment `# <group>: …` in the recipe names.

    A recipe cannot choose it in its defaults list, because Hydra finds the recipe itself last.
    """
    return choices.tags("recipe/data", _recipe("data", algo, dataset)).get(group, default)


def _dataset_settings(names: Sequence[str], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of several datasets by name.

    Args:
        names: Choices of the group dataset.
        changes: Settings that all of the datasets get that have them; for a name, further ones of
            this dataset only.
    """
    settings: dict[str, Any] = {}
    for name in names:
        node: Any = OmegaConf.to_container(compose_config([f"dataset={name}"]).dataset)
        shared = {key: value for key, value in changes.items() if key in node and key not in names}
        settings[name] = {**node, **shared, **changes.get(name, {})}
    known = {key for node in settings.values() for key in node}
    for key in changes:
        if key not in known and key not in names:
            hint = nearest(key, sorted(known))
            raise UserError(f"dataset.settings.{key}: no part has such a setting{hint}")
    return settings


def _by(key: str, table: Mapping[Any, Any], *, _root_: Any) -> Any:
    """Return the value in a table for another setting's value, or for `else`."""
    value = OmegaConf.select(_root_, key)
    values = {str(one): own for one, own in table.items()}
    if str(value) not in values and "else" not in values:
        known = ", ".join(values)
        raise UserError(
            f"{key}={value}: this method's recipe for this dataset has {known} only; choose one, "
            "and change single settings as you like"
        )
    return values.get(str(value), values.get("else"))


OmegaConf.register_new_resolver("by", _by, replace=True)
OmegaConf.register_new_resolver("dataset_settings", _dataset_settings, replace=True)
OmegaConf.register_new_resolver("recipe", _recipe, replace=True)
OmegaConf.register_new_resolver("recipe_choice", _recipe_choice, replace=True)


def recipe_names(algo: str, dataset: str, backbone: str) -> list[str]:
    """Return the names of the recipes that apply: for the dataset, and for the backbone on it."""
    names = (_recipe("data", algo, dataset), _recipe("net", algo, dataset, backbone))
    return [name for name in names if name != "none"]


def recipe_line(chosen: Any) -> str:
    """Return a line that names the recipe for Hydra's choices of groups."""
    if chosen.get("experiment") not in (None, *choices.reproductions()):
        return f"recipe: experiment {chosen.experiment}"
    if names := recipe_names(chosen.algo, chosen.dataset, chosen.backbone):
        return f"recipe: {', '.join(names)}"
    return f"recipe: none for {chosen.algo} on {chosen.dataset}; general settings apply"


@contextlib.contextmanager
def hydra_errors(overrides: list[str]) -> Iterator[None]:
    """Turn an error of Hydra or OmegaConf into a UserError of one line."""
    try:
        yield
    # Hydra raises its own errors, OmegaConf's and ValueErrors for a command line that it rejects.
    except Exception as error:
        raise UserError(_translated(error, overrides)) from None


def _translated(error: Exception, overrides: list[str]) -> str:
    from hydra.errors import HydraException

    text = str(error)
    if match := re.search(r"Could not (?:find|load) '([^'/]+(?:/[^'/]+)*)/([^'/]*)'", text):
        return choices.no_such_choice(match[1], match[2], re.findall(r"\n\t(\w+)(?=\n|$)", text))
    if "Config group override must be a string" in text:
        for key, _, name in (word.lstrip("+").partition("=") for word in overrides):
            if key in choices.groups() and name not in choices.options(key):
                return choices.no_such_choice(key, name)
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{match[1]}: several values require a multirun; add -m"
    if match := re.search(r"An item is already at '([^']+)'", text):
        return f"+{match[1]}: this setting exists; leave out the +"
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1].lstrip("+~")
        if "No match in the defaults list" in text:
            return f"{key}: there is no such group{nearest(key, choices.groups())}"
        names = [*choices.groups(), "hydra"]  # Hydra's own settings are suggested for its own
        is_hydras = key.startswith("hydra")
        chosen = [word for word in overrides if re.split("[=/]", word)[0] in names]
        try:
            config = _composed([word for word in chosen if word.split("=")[0] != key], is_hydras)
            known = [*leaves(config), *(config.hydra.runtime.choices if is_hydras else ())]
        except Exception:  # a group is mistyped too: no suggestion
            known = []
        if key in known:
            return f"{key}: this sets keys that do not exist; write +{key}={{...}} to add them"
        return f"{key}: there is no such key{nearest(key, [*known, *choices.groups()])}"
    for word in overrides:
        try:
            parsed([word])
        except HydraException:
            key, _, value = word.partition("=")
            return f"{word}: cannot be read; quote such a value twice: '{key}=\"{value}\"'"
    return f"{first_line(error)} (in: {' '.join(overrides)})"


def parsed(overrides: list[str]) -> list[Any]:
    """Parse overrides by Hydra's grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_overrides(overrides)


def _composed(overrides: list[str], with_hydra: bool = False) -> DictConfig:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="metalearn"):
        return compose("config", completed(overrides), return_hydra_config=with_hydra)


def completed(overrides: list[str], folders: Sequence[Path] = ()) -> list[str]:
    """Return overrides with what others imply; nothing more is added to the result.

    Args:
        overrides: Overrides as on the command line. For `train.optimiser=…`, `optimiser=…` is
            added, so that the optimiser's settings exist.
        folders: Configuration folders to read, in addition to those of plugins.
    """
    _register_gates()
    # Settings that have moved.
    overrides = [re.sub(r"^logger\.name=", "logger=", word) for word in overrides]
    moved = r"^logger\.(project|entity)="
    overrides = [re.sub(moved, r"logger.wandb.\1=", word) for word in overrides]
    given = dict(word.split("=", 1) for word in overrides if "=" in word)
    name, more = given.get("train.optimiser"), []
    if name in ("adam", "sgd") and "optimiser" not in given:
        more.append(f"optimiser={name}")
    folders = [*folders, *plugins.conf_dirs()]
    if folders and "hydra.searchpath" not in given:
        paths = ",".join(quoted(f"file://{folder}") for folder in folders)
        more.append(f"hydra.searchpath=[{paths}]")
    return [*overrides, *more]


@functools.cache
def _register_gates() -> None:
    """Make each gate a choice of Hydra's group experiment."""
    from hydra.core.config_store import ConfigStore

    for name, gate in gates.gates().items():
        ConfigStore.instance().store(name, gate.node(), group="experiment", package="_global_")


def compose_config(overrides: list[str], with_hydra: bool = False) -> DictConfig:
    """Compose the configuration, optionally with Hydra's own settings.

    Raise UserError for a wrong override; it names the nearest right one.
    """
    with hydra_errors(overrides):
        return _composed(overrides, with_hydra)


def without_hydra(config: DictConfig) -> DictConfig:
    """Return a composed configuration without Hydra's own settings."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def load_config(folder: Path) -> DictConfig:
    """Load the configuration of a run folder, with defaults for settings newer than the run.

    Raise UserError if there is none, or one that this version cannot read.
    """
    path = folder / "config.yaml"
    stored = OmegaConf.create(read_yaml(path))
    with prefixed(path):
        return OmegaConf.create(plain(check_config(stored)))


def apply_overrides(stored: DictConfig, overrides: list[str]) -> DictConfig:
    """Apply overrides to a stored configuration.

    Args:
        stored: Configuration of a run.
        overrides: `key=value` settings, or `dataset=` or `episode=` with the name of a choice.

    Raises:
        UserError: For an unknown key or several values.
    """
    result: Any = OmegaConf.create(OmegaConf.to_container(stored))
    with hydra_errors(overrides):
        changes = parsed(overrides)
    for override in changes:
        key, value = override.key_or_group, override.value()
        if key == "dataset":
            result.dataset = compose_config([f"dataset={value}"]).dataset
        elif key == "episode":  # changes the test episodes only
            shape = compose_config([f"episode={value}"]).episode
            result.episode = OmegaConf.merge(
                result.episode, {name: shape[name] for name in ("way", "shot", "query")}
            )
        elif override.is_sweep_override():
            raise UserError(f"{override.input_line}: a test has one value for each setting")
        elif OmegaConf.select(result, key, default=key) == key:
            hint = nearest(key, leaves(result))
            raise UserError(f"{override.input_line}: there is no such key{hint}")
        else:
            OmegaConf.update(result, key, value)
    return result
