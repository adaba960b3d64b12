"""Packages that add methods, datasets, backbones, losses and augmentations, and the folders of YAML files that they bring.

A package is a plugin if the installed environment says so, by an entry point in the group `metalearn.plugins`, or if the command
line or the caller names it (`plugins=[my_package]`). Nothing that is stored, such as a run's config.yaml, can add one.
"""

import functools
import importlib
import importlib.util
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from metalearn.system.errors import UserError, first_line, nearest

#: Packages named by the command line or the caller of this process.
_named: list[str] = []


@functools.cache
def installed() -> tuple[str, ...]:
    """Return the packages that declare an entry point; they are not imported by this."""
    points = metadata.entry_points(group="metalearn.plugins")
    return tuple(dict.fromkeys(point.value.partition(":")[0] for point in points))


def add(names: Iterable[str]) -> None:
    """Import packages and allow their classes. Raises UserError for one that cannot be imported."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever the package does when it is imported
            raise UserError(
                f"plugins=[{name}]: cannot be imported ({type(error).__name__}: {first_line(error)})"
            ) from None
        if name not in _named:
            _named.append(name)


def named() -> tuple[str, ...]:
    """Return the packages named by the command line or the caller, to pass on to other processes."""
    return tuple(_named)


def packages() -> set[str]:
    """Return the top-level packages whose classes may be used."""
    return {name.partition(".")[0] for name in (*_named, *installed())}


def conf_dirs() -> list[Path]:
    """Return the folders `conf/` of all plugins, beside their modules."""
    folders = []
    for name in dict.fromkeys((*_named, *installed())):
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            spec = None
        for place in (spec.submodule_search_locations if spec else None) or []:
            if (Path(place) / "conf").is_dir():
                folders.append(Path(place) / "conf")
    return folders


def find(name: str, known: dict[str, object], where: str) -> object:
    """Return the entry of this name, or for `package.module.name` the function of a plugin.

    Args:
        name: as a setting gives it.
        known: functions by name.
        where: the setting, for the error.

    Raises:
        UserError: where there is none.
    """
    if name in known:
        return known[name]
    module, _, attribute = name.rpartition(".")
    if module and module.partition(".")[0] in packages():
        try:
            function = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError):
            function = None
        if callable(function):
            return function
    raise UserError(
        f"{where}={name}: there is no such name; there are {', '.join(known)}{nearest(name, known)}"
    )
