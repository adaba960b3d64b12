"""How a setting says what it accepts and what it is for: one line in a dataclass, checked by `metalearn.config`.

Every setting has its value in `conf/`. A setting with a default may be absent from a stored run or from a plugin's YAML: the
default is the value that runs older than the setting have.

Roles say what a setting is for; from them follows what resume, evaluate, reproduce and compare may change or ignore:
  identity      what is trained: runs that differ in it are different methods
  protocol      what is measured
  seed          which sample of the same method
  machine       where and how it is computed; `rounds` says that rounding may differ
  presentation  what is shown and kept: it changes no number
"""

import dataclasses
from typing import Any

ROLES = ("identity", "protocol", "seed", "machine", "presentation")
_MISSING = dataclasses.MISSING


def anything(
    *,
    default: Any = _MISSING,
    role: str = "",
    rounds: bool = False,
    in_testing: str = "",
    **rule: Any,
) -> Any:
    """Declare a setting without bounds.

    Args:
        default: its value where a stored run or a plugin's YAML lacks it.
        role: one or several of `ROLES`, separated by spaces; "": those of its group.
        rounds: whether another value of a machine setting may round differently.
        in_testing: the setting that takes its place in testing, where only training reads this one.
        rule: bounds, as the functions below give them.
    """
    metadata = rule | {"role": role, "rounds": rounds, "in_testing": in_testing}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: default.copy(), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def choice(*allowed: str, **options: Any) -> Any:
    """Declare a setting that is one of the given words. options: as in `anything`."""
    return anything(choices=allowed, **options)


def at_least(minimum: float, **options: Any) -> Any:
    """Declare a number (or a list of numbers) that is not below `minimum`."""
    return anything(minimum=minimum, **options)


def above(bound: float, **options: Any) -> Any:
    """Declare a number (or a list of numbers) that is greater than `bound`."""
    return anything(above=bound, **options)


def between(low: float, high: float, **options: Any) -> Any:
    """Declare a number in [low, high]."""
    return anything(minimum=low, maximum=high, **options)


def given_by_run(default: Any = _MISSING) -> Any:
    """Declare a field that `metalearn.build` or the engine supplies at run time; it is never in YAML."""
    return dataclasses.field(default=default, metadata={"runtime": True})
