"""How a setting says what it accepts: one line in a dataclass, checked by `metalearn.config`.

Settings carry no defaults: every value stands in `conf/`.
"""

import dataclasses
from typing import Any


def choice(*allowed: str) -> Any:
    """A setting that is one of the given words."""
    return dataclasses.field(metadata={"choices": allowed})


def at_least(minimum: float) -> Any:
    """A number (or a list of numbers) that is not below `minimum`."""
    return dataclasses.field(metadata={"minimum": minimum})


def above(bound: float) -> Any:
    """A number (or a list of numbers) that is strictly greater than `bound`."""
    return dataclasses.field(metadata={"above": bound})


def between(low: float, high: float) -> Any:
    """A number in [low, high]."""
    return dataclasses.field(metadata={"minimum": low, "maximum": high})


def given_by_run(default: Any = dataclasses.MISSING) -> Any:
    """A field that `metalearn.build` or the engine supplies at run time; it never stands in YAML."""
    return dataclasses.field(default=default, metadata={"runtime": True})
