"""Read text, JSON and YAML files that somebody else may have written.

Only regular files of a limited size are read; what they hold is limited in depth and number, and
none of it is executed or resolved. Every failure is one line that names the file.
"""

import json
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from metalearn.system.errors import UserError, first_line

_MIB = 1 << 20
_DEPTH = 30
#: Largest configuration, in bytes (without its C parser PyYAML takes 3 s) and in values.
_YAML_BYTES, _YAML_VALUES = _MIB // 8, 20_000
_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes, or what a link to one leads to.

    Raise UserError if it does not exist, is a folder, pipe or device, is too large, or unreadable.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # to open a pipe or a device can wait forever
            raise UserError(f"{path} is not a file but a folder, a pipe or a device")
        if status.st_size > limit:
            raise UserError(f"{path} has {status.st_size:,} bytes; at most {limit:,} are read")
        with path.open("rb") as stream:
            return stream.read(status.st_size)  # no more, because some files of Linux never end
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path} cannot be read ({reason})") from None


def read_text(path: Path, limit: int = 64 * _MIB) -> str:
    """Read a UTF-8 file of at most `limit` bytes; raise UserError if that is not possible."""
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None


def parse_json(text: str) -> Any:
    """Parse JSON; raise ValueError if it is none, or nested too deeply."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    check_limits(content)
    return content


def read_json(path: Path, types: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a JSON file of named values, of types as `check_types` has them, or raise UserError."""
    text = read_text(path)
    try:
        content: dict[str, Any] = parse_json(text)
        check_types(content, types or {})
    except ValueError as error:
        raise UserError(f"{path} is not as metalearn writes it: {first_line(error)}") from None
    return content


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of resolved settings.

    Raise UserError if it cannot be read, is not such a file, or holds an interpolation.
    """
    text = read_text(path, _YAML_BYTES)
    # The C parser refuses the escapes of lone surrogates, which stand for bytes of a file name.
    has_surrogates = re.search(r"\\u[dD][89a-fA-F]", text)
    try:
        content: dict[str, Any] = yaml.load(text, _LOADER if has_surrogates else _FAST_LOADER)
        check_types(content, {})
        check_limits(content, _YAML_VALUES, _check_setting)
    except Exception as error:  # PyYAML raises errors of many kinds
        reason = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        if mark := getattr(error, "problem_mark", None):
            reason = f"line {mark.line + 1}: {getattr(error, 'problem', reason)}"
        raise UserError(f"{path} is not a readable configuration: {reason}") from None
    return content


def check_types(content: Any, types: Any, name: str = "") -> None:
    """Check the types of parsed values; raise ValueError for the first difference.

    Types are a type; a list with the type of all items; a tuple of a type and a list, of which one
    fits; or types by name. A name that ends with "?" may be absent; the name "*" stands for all
    others. `name` is that of the content in messages.
    """
    if isinstance(types, Mapping):
        if not isinstance(content, Mapping):
            raise ValueError(f"{name.rstrip('.') or 'it'} should hold named values")
        others = content.keys() - {key.rstrip("?") for key in types}
        for key, kind in types.items():
            keys = others if key == "*" else {key.rstrip("?")} & content.keys()
            if not keys and key[-1] not in "*?":
                raise ValueError(f"{name}{key} is missing")
            for own in keys:
                check_types(content[own], kind, f"{name}{own}{'.' * isinstance(kind, Mapping)}")
    elif isinstance(types, tuple):
        kind = next(one for one in types if isinstance(one, list) == isinstance(content, list))
        check_types(content, kind, name)
    elif isinstance(types, list):
        if not isinstance(content, list | tuple):
            raise ValueError(f"{name} should be a list")
        for item in content:
            check_types(item, types[0], name)
    elif not (type(content) is types or (types is float and type(content) is int)) or (
        types in (int, float) and not abs(content) < 1e300
    ):
        raise ValueError(f"{name} should be {_KINDS[types]}")


def check_limits(
    content: Any, most: float = 1e9, check: Callable[[Any, str], None] = lambda value, name: None
) -> None:
    """Check the number and the depth of parsed values; those of an alias count wherever it is used.

    `check` is called with each value and its dotted name. Raise ValueError if there are more than
    `most` values or too many levels.
    """
    waiting, count = [(content, "", 0)], 0
    while waiting:
        node, name, depth = waiting.pop()
        check(node, name)
        if isinstance(node, dict | list | tuple):
            count += len(node)
            if depth >= _DEPTH or count > most:
                raise ValueError("too many values" if count > most else "nested too deeply")
            items = node.items() if isinstance(node, dict) else enumerate(node)
            waiting += [(value, f"{name}.{key}".lstrip("."), depth + 1) for key, value in items]


def _check_setting(value: Any, name: str) -> None:
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name or 'it'} has a name that is not text")
    if not isinstance(value, dict | list | str | int | float | None):
        raise ValueError(f"{name} is a {type(value).__name__}, not a setting")
    if isinstance(value, str) and "${" in value:
        raise ValueError(f"{name} is an interpolation, but a run folder holds resolved values only")


def _loader(base: Any) -> Any:
    """Return a loader that does not merge mappings (`<<`): a small file could become very large."""
    return type("_Loader", (base,), {"flatten_mapping": lambda self, node: None})


_LOADER = _loader(yaml.SafeLoader)
#: The C parser, where PyYAML has it: a multirun may have a thousand configurations.
_FAST_LOADER = _loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader))
