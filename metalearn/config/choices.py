"""The choices of the configuration groups: their files, and what comments in these say."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from metalearn.config import gates, plugins
from metalearn.config.components import conf_dir
from metalearn.system.errors import UserError, nearest
from metalearn.system.reading import read_yaml

#: Families of methods, in the order of lists and tables.
FAMILIES = (
    "gradient", "metric", "closed_form", "transductive", "memory", "generative", "unsupervised",
    "transfer",
)  # fmt: skip

#: Launchers and sweepers that come with an extra.
_PLUGINS = {
    "optuna": "sweep", "joblib": "sweep", "submitit_local": "sweep", "submitit_slurm": "sweep",
    "ray": "ray",
}  # fmt: skip


def conf_dirs() -> list[Path]:
    """Return the `conf/` folders of the package and of plugins."""
    return [conf_dir(), *plugins.conf_dirs()]


def file_of(group: str, name: str) -> Path | None:
    """Return the file of a choice, or None."""
    return next(
        (path for folder in conf_dirs() if (path := folder / group / f"{name}.yaml").is_file()),
        None,
    )


def groups() -> list[str]:
    """Return the names of the configuration groups."""
    return sorted(
        {path.name for folder in conf_dirs() for path in folder.iterdir() if path.is_dir()}
        - {"hydra"}
    )


def options(group: str) -> dict[str, str]:
    """Return the choices of a group, each with the first comment line of its file; and gates."""
    choices = {}
    for path in sorted(path for folder in conf_dirs() for path in (folder / group).glob("*.yaml")):
        choices[path.stem] = next(
            (line for line in _comments(path) if not line.startswith("@package")), ""
        )
    return {**choices, **reproductions()} if group == "experiment" else choices


def stored_values(group: str, name: str) -> dict[str, Any]:
    """Return the values that the file of a choice gives to its group, with those that it extends.

    This composes no run, so it takes milliseconds. Raise UserError for an unknown choice.
    """
    path = file_of(group, name)
    if path is None:
        raise UserError(no_such_choice(group, name))
    content = read_yaml(path)
    parents = [one for one in content.pop("defaults", []) if isinstance(one, str)]
    values = [
        stored_values(group, one.partition("@")[0]) for one in parents if not one.startswith("_")
    ]
    merged: Any = OmegaConf.to_container(OmegaConf.merge(*values, content.get(group, content)))
    return merged


def reproductions() -> dict[str, str]:
    """Return the experiments that reproduce a published result, with one line each."""
    return {
        name: f"{' '.join(gate.choices().values())}; {gate.source}"
        for name, gate in gates.gates().items()
    }


def families() -> dict[str, list[str]]:
    """Return the methods of each family, by the comment `# family: …` in its file, or "other"."""
    names: dict[str, list[str]] = {family: [] for family in FAMILIES}
    for name in options("algo"):
        names.setdefault(tags("algo", name).get("family", "other"), []).append(name)
    return {family: own for family, own in names.items() if own}


def tags(group: str, name: str) -> dict[str, str]:
    """Return the comments `# tag: …` in the file of a choice, by tag; {} if there is no file."""
    path = file_of(group, name)
    lines = [line.partition(":") for line in _comments(path)] if path else []
    return {tag: text.strip() for tag, _, text in reversed(lines)}


def _comments(path: Path) -> list[str]:
    return [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]


def no_such_choice(group: str, name: str, installed: Sequence[str] = ()) -> str:
    """Return the message for an unknown choice; `installed` are those of one of Hydra's groups."""
    if group.startswith("hydra/"):
        extra = _PLUGINS.get(name)
        source = f"metalearn-lab[{extra}]" if extra else "the plugin of Hydra that has it"
        hint = "" if extra else nearest(name, [*installed, *_PLUGINS])
        return f"{group}={name}: is not installed; install {source}{hint}"
    choices = options(group)
    known = f"; there are {', '.join(choices)}{nearest(name, choices)}" if choices else ""
    return f"{group}={name}: there is no such {group}{known}"
