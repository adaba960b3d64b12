"""From `conf/` and a command line to one composed configuration, by Hydra; its errors in one line."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from metalearn.config import plugins
from metalearn.config.checking import checked, leaves, plain
from metalearn.config.components import conf_dir
from metalearn.system.errors import UserError, first_line, nearest


def conf_dirs() -> list[Path]:
    """Return the package's own `conf/`, and those of plugins."""
    return [conf_dir(), *plugins.conf_dirs()]


def search_path(folders: list[Path]) -> list[str]:
    """Return the override by which Hydra looks for configuration files in these folders too; [] for none."""
    if not folders:
        return []
    places = ",".join(quoted(f"file://{folder}") for folder in folders)
    return [f"hydra.searchpath=[{places}]"]


def quoted(text: str) -> str:
    """Return a text as a quoted value of Hydra's grammar."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _file(group: str, name: str) -> Path | None:
    """Return the file of a choice, or None."""
    return next(
        (path for folder in conf_dirs() if (path := folder / group / f"{name}.yaml").is_file()),
        None,
    )


def _recipe(kind: str, algo: str, *others: str) -> str:
    """Return the name of the recipe that applies to a method, on a dataset and with a backbone; "none" where there is none.

    A method without a recipe of its own has that of the first family that has one; a comment `# recipes: …` in its file names them.
    """
    names = [algo]
    if (path := _file("algo", algo)) is not None:
        lines = [line for line in _comments(path) if line.startswith("recipes:")]
        names += [name.strip() for line in lines for name in line.partition(":")[2].split(",")]
    known = ["-".join([name, *others]) for name in names]
    return next((name for name in known if _file(f"recipe/{kind}", name) is not None), "none")


OmegaConf.register_new_resolver("recipe", _recipe, replace=True)


def recipe_names(algo: str, dataset: str, backbone: str) -> list[str]:
    """Return the names of the recipes that apply: for the dataset, and for the backbone on it."""
    names = (_recipe("data", algo, dataset), _recipe("net", algo, dataset, backbone))
    return [name for name in names if name != "none"]


def recipe_line(choices: Any) -> str:
    """Return a line that says which recipe applies to Hydra's choices of groups."""
    if choices.get("experiment"):
        return f"recipe: experiment {choices.experiment}"
    if names := recipe_names(choices.algo, choices.dataset, choices.backbone):
        return f"recipe: {', '.join(names)}"
    return f"recipe: none for {choices.algo} on {choices.dataset}; general settings apply"


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
        if not any((folder / group).is_dir() for folder in conf_dirs()):
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
        yield lambda overrides, **options: compose(
            "config", overrides=with_plugins(overrides), **options
        )


def with_plugins(overrides: list[str]) -> list[str]:
    """Return overrides that look for configuration files in the folders of plugins too."""
    if any(word.startswith("hydra.searchpath=") for word in overrides):
        return overrides
    return [*overrides, *search_path(plugins.conf_dirs())]


def composed(overrides: list[str], with_hydra: bool = False) -> DictConfig:
    """The composed configuration. Raises: UserError naming the word that is wrong, and the nearest right one."""
    with _hydra_errors(overrides), initialised() as compose:
        return compose(overrides, return_hydra_config=with_hydra)


def without_hydra(config: DictConfig) -> DictConfig:
    """Return a composed configuration without Hydra's own part."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


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
    try:
        return OmegaConf.create(plain(checked(found)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


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
            result.episode = OmegaConf.merge(
                result.episode, {name: shape[name] for name in ("way", "shot", "query")}
            )
        elif override.is_sweep_override():
            raise UserError(f"{override.input_line}: a test has one value for each setting")
        elif OmegaConf.select(stored, key, default=key) == key:
            raise UserError(f"{override.input_line}: there is no such key{nearest(key, known)}")
        else:
            OmegaConf.update(result, key, value)
    return result


def is_sweep(override: str) -> bool:
    """Return True if an override gives several values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(override).is_sweep_override()


def one_run_per_value(overrides: list[str]) -> list[list[str]]:
    """Return runs of a multirun, as plain overrides, in which each value of each axis occurs.

    The first has the first value of each axis; each other has one other value. Search ranges (of sweepers with a strategy) are
    left out.
    """
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
    first = [axis[0] for axis in axes]
    others = [
        [*first[:number], value, *first[number + 1 :]]
        for number, axis in enumerate(axes)
        for value in axis[1:]
    ]
    return [first, *others]


def groups() -> list[str]:
    """Names of the configuration groups."""
    return sorted(
        {path.name for folder in conf_dirs() for path in folder.iterdir() if path.is_dir()}
        - {"hydra"}
    )


def options(group: str) -> dict[str, str]:
    """The choices of a group, each with the first comment line of its file."""
    found = {}
    for path in sorted(path for folder in conf_dirs() for path in (folder / group).glob("*.yaml")):
        found[path.stem] = next(
            (line for line in _comments(path) if not line.startswith("@package")), ""
        )
    return found


def families() -> dict[str, list[str]]:
    """The algorithms of each family, which a comment `# family: …` in their file names; "other" where none does."""
    found: dict[str, list[str]] = {"gradient": [], "metric": [], "memory": [], "transfer": []}
    for name in options("algo"):
        path = _file("algo", name)
        comments = _comments(path) if path else []
        family = next(
            (line.partition(":")[2].strip() for line in comments if line.startswith("family:")),
            "other",
        )
        found.setdefault(family, []).append(name)
    return found


def _comments(path: Path) -> list[str]:
    return [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
