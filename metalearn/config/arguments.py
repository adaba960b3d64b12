"""Check settings that become arguments of a loss, an augmentation or an optimiser."""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from metalearn.config.checking import conform
from metalearn.config.components import TYPES, Setting
from metalearn.system.errors import UserError, nearest


def check_arguments(
    function: Callable[..., Any],
    values: Mapping[str, Any],
    where: str,
    name: str,
    reserved: Collection[str],
) -> dict[str, Any]:
    """Convert settings to the types that a function's annotations or defaults have.

    An annotation can have bounds: `Annotated[int, at_least(0)]`. Parameters in `reserved` are not
    settings; errors contain `where`, the prefix of the settings, and the function's `name`. Raise
    UserError for an unknown setting, a wrong type, a missing value or one out of bounds.
    """
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # an annotation that exists for type checkers only
        hints = {}
    settings = {
        key: _setting(parameter, hints.get(key, Any))
        for key, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in named and key not in reserved
    }
    for key, value in values.items():
        if key not in settings:
            hint = nearest(f"{where}.{key}", [f"{where}.{one}" for one in settings])
            raise UserError(f"{where}.{key}: {name} has no such setting{hint}")
        if settings[key].kind is bool and not isinstance(value, bool):  # OmegaConf accepts 3 too
            raise UserError(f"{where}.{key}={value}: should be true or false")
        for default in settings[key].default:
            if isinstance(default, tuple) and not _fits(value, default):
                raise UserError(
                    f"{where}.{key}={value}: should be {len(default)} numbers, like {list(default)}"
                )
    given = [one for one in settings.values() if one.name in values or not one.default]
    return conform(given, values, f"{where}.")


def _setting(parameter: inspect.Parameter, hint: Any) -> Setting:
    rule: dict[str, Any] = {}
    if typing.get_origin(hint) is typing.Annotated:
        hint, *extras = typing.get_args(hint)
        for one in extras:
            if isinstance(one, dataclasses.Field):
                rule.update(one.metadata)
    default = parameter.default
    if hint not in TYPES.values():
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        hint = bool if isinstance(default, bool) else float if is_number else Any
    return Setting(parameter.name, hint, rule, () if default is parameter.empty else (default,))


def _fits(value: Any, default: tuple[Any, ...]) -> bool:
    """Return True for a list of numbers as long as the default; null where the default has it."""
    if not isinstance(value, list | tuple) or len(value) != len(default):
        return False
    kinds = ({int, float} | {type(usual)} & {type(None)} for usual in default)
    return all(type(one) in own for one, own in zip(value, kinds, strict=True))
