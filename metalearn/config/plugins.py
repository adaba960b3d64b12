"""Use packages that add methods, datasets, backbones, losses, augmentations and YAML files.

A package is a plugin if the installed environment declares it (an entry point in the group
`metalearn.plugins`) or the command line or the caller names it (`plugins=[my_package]`). A stored
file, such as a run's config.yaml, cannot add one.
"""

import contextlib
import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Collection, Iterable
from importlib import metadata
from pathlib import Path

from metalearn.system.errors import UserError, first_line, nearest

#: Packages named by the command line or the caller of this process.
_named: list[str] = []


@functools.cache
def installed() -> tuple[str, ...]:
    """Return the packages that declare an entry point, without importing them."""
    points = metadata.entry_points(group="metalearn.plugins")
    return tuple(dict.fromkeys(point.value.partition(":")[0] for point in points))


def add(names: Iterable[str]) -> None:
    """Import packages and allow their classes and functions; a string is one name.

    Raise UserError if a package cannot be imported.
    """
    for name in [names] if isinstance(names, str) else names:
        try:
            importlib.import_module(name)
        except Exception as error:  # a package may raise anything on import
            raise UserError(
                f"plugins=[{name}]: cannot be imported "
                f"({type(error).__name__}: {first_line(error)})"
            ) from None
        if name not in _named:
            _named.append(name)


def named() -> tuple[str, ...]:
    """Return the packages that the command line or the caller named, for other processes."""
    return tuple(_named)


def packages() -> set[str]:
    """Return the modules whose content may be used: these and all below them."""
    return {*_named, *installed()}


def check_allowed(path: str, where: str, otherwise: str) -> None:
    """Raise UserError if `package.module.name`, the value of a setting, belongs to no plugin.

    The message ends with `otherwise`: what else would be right.
    """
    package = path.partition(".")[0]
    if not any(f"{path}.".startswith(f"{one}.") for one in packages()):
        raise UserError(
            f"{where}={path}: {package} is not a plugin of this installation; if you trust it, add "
            f"plugins=[{package}]; otherwise {otherwise}"
        )


def import_object(path: str, where: str) -> object:
    """Import `package.module.name`, the value of a setting; return None if there is none.

    Raise UserError if importing the module raises an ImportError.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        is_absent = isinstance(error, ModuleNotFoundError) and error.name is not None
        if is_absent and f"{module}.".startswith(f"{error.name}."):
            return None
        raise UserError(f"{where}={path}: cannot be imported ({first_line(error)})") from None


def conf_dirs() -> list[Path]:
    """Return the `conf/` folders next to the modules of all plugins."""
    folders: list[Path] = []
    for name in dict.fromkeys((*_named, *installed())):
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(name)
            locations = (spec.submodule_search_locations if spec else None) or []
            folders += [Path(folder, "conf") for folder in locations]
    return [folder for folder in folders if folder.is_dir()]


def find(name: str, known: dict[str, object], where: str) -> object:
    """Return the function that a setting names in `known`, or as `package.module.name` of a plugin.

    Raise UserError if there is none.
    """
    if name in known:
        return known[name]
    if re.fullmatch(r"\w+(\.\w+)+", name) and not is_own_or_standard(name):
        check_allowed(name, where, f"use one of {', '.join(known)}")
        function = import_object(name, where)
        if callable(function):
            return function
    raise no_such_name(name, known, where)


def no_such_name(name: str, known: Collection[str], where: str) -> UserError:
    """Return the error for an unknown name."""
    names = f"{', '.join(known)}{nearest(name, known)}"
    return UserError(f"{where}={name}: there is no such name; there are {names}")


def is_own_or_standard(path: str) -> bool:
    """Return True for a name in metalearn or in the standard library, which are never plugins."""
    return path.partition(".")[0] in {"metalearn", *sys.stdlib_module_names}
