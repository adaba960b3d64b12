"""Declare what a setting accepts and what it is for, in one line of a dataclass.

Every setting has its value in `conf/`. A setting with a default may be absent from a stored run
or a plugin's YAML; the default is the value that runs older than the setting have.

A setting's role decides what resume, evaluate, reproduce and compare may change or ignore:
  identity      what is trained: runs with different values are different methods
  protocol      what is measured
  seed          which sample of the same method
  machine       where and how it is computed; with `rounds`, results may differ by rounding
  presentation  what is shown and stored; no number depends on it
"""

import dataclasses
from typing import Any

ROLES = ("identity", "protocol", "seed", "machine", "presentation")
_MISSING = dataclasses.MISSING


def setting(
    *,
    default: Any = _MISSING,
    role: str = "",
    rounds: bool = False,
    in_testing: str = "",
    **rule: Any,
) -> Any:
    """Declare a setting without bounds.

    Args:
        default: Value if a stored run or a plugin's YAML lacks the setting.
        role: One or several of `ROLES`, separated by spaces; "" for the role of its group.
        rounds: Whether results for different values may differ by rounding.
        in_testing: If only training reads this setting, the setting that testing reads instead.
        rule: Bounds, as the functions below give them; or `components`, the group of the components
            whose settings a dictionary holds by name.
    """
    flags = {"role": role, "rounds": rounds, "in_testing": in_testing}
    metadata = rule | {name: value for name, value in flags.items() if value}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: default.copy(), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def choice(*allowed: str, **options: Any) -> Any:
    """Declare a setting with one of the given values; `options` as for `setting`."""
    return setting(choices=allowed, **options)


def at_least(minimum: float, **options: Any) -> Any:
    """Declare a number, or a list of numbers, of at least `minimum`."""
    return setting(minimum=minimum, **options)


def count_or_range(**options: Any) -> Any:
    """Declare a whole number of at least 1, or a list [low, high] of two."""
    return setting(minimum=1, is_range=True, **options)


def above(bound: float, **options: Any) -> Any:
    """Declare a number, or a list of numbers, greater than `bound`."""
    return setting(above=bound, **options)


def between(low: float, high: float, **options: Any) -> Any:
    """Declare a number in [low, high]."""
    return setting(minimum=low, maximum=high, **options)


def note() -> Any:
    """Declare a text about the data, which nothing depends on; the default is ""."""
    return dataclasses.field(default="", repr=False, metadata={"role": "presentation"})


def given_by_run(default: Any = _MISSING) -> Any:
    """Declare a field that `metalearn.run` or the engine sets at run time; it is not in YAML."""
    return dataclasses.field(default=default, metadata={"runtime": True})
