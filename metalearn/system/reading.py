"""Read text, JSON and YAML files that somebody else may have written.

Only regular files of a limited size are read, what they hold is limited in depth and number, and
no content is executed or resolved. Every failure is one line that names the file.
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
#: Largest YAML file, in bytes; PyYAML takes 3 s for this size without its C parser.
_YAML_BYTES = _MIB // 8
_DEPTH, _YAML_VALUES, _DIGITS = 30, 20_000, 64
_NAMES = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false"}


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a regular file, or what a link to one leads to.

    Args:
        path: The file.
        limit: Largest size in bytes.

    Raises:
        UserError: If it does not exist, is a folder, pipe or device, is too large, or unreadable.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # to open a pipe or a device can wait forever
            raise UserError(f"{path} is not a file but a folder, a pipe or a device")
        if status.st_size > limit:
            raise UserError(f"{path} has {status.st_size:,} bytes; at most {limit:,} are read")
        with path.open("rb") as stream:
            return stream.read(status.st_size)  # no more, because some files of Linux never end
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:  # a null character in the path
        raise UserError(f"{path} cannot be read ({error})") from None


def read_text(path: Path, limit: int = 64 * _MIB) -> str:
    """Read a UTF-8 file of at most `limit` bytes.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None


def parse_json(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: If it is not JSON, is nested too deeply, or a number has too many digits.
    """
    try:
        content = json.loads(text, parse_int=_whole_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_limits(content)
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: If it cannot be read or is not such a file.
    """
    try:
        content = parse_json(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not readable JSON: it holds no object")
    return content


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of resolved settings.

    Raises:
        UserError: If it cannot be read, is not such a file, or holds an interpolation.
    """
    text = read_text(path, _YAML_BYTES)
    # The C parser refuses the escapes of lone surrogates, which stand for bytes of a file name.
    has_surrogates = re.search(r"\\u[dD][89a-fA-F]", text)
    try:
        content = yaml.load(text, _LOADER if has_surrogates else _FAST_LOADER)
        if not isinstance(content, dict):
            raise ValueError("it holds no settings")
        _check_limits(content, _YAML_VALUES, _check_setting)
    except Exception as error:  # PyYAML raises errors of many kinds
        reason = "nested too deeply" if isinstance(error, RecursionError) else _reason(error)
        raise UserError(f"{path} is not a readable configuration: {reason}") from None
    return content


def check_types(content: Any, expected: Any, name: str = "it") -> None:
    """Check the types of parsed JSON.

    Args:
        content: The parsed JSON.
        expected: A type; a list with the type of all items; or a mapping of names to such. A name
            that ends with "?" may be absent; the name "*" stands for all others.
        name: Name of `content` in messages.

    Raises:
        ValueError: For the first difference.
    """
    if isinstance(expected, Mapping):
        if not isinstance(content, Mapping):
            raise ValueError(f"{name} should hold named values")
        inside = "" if name == "it" else f"{name}."
        for key, kind in expected.items():
            own = key.rstrip("?")
            if key == "*":
                for other in content.keys() - {one.rstrip("?") for one in expected}:
                    check_types(content[other], kind, f"{inside}{other}")
            elif own in content:
                check_types(content[own], kind, f"{inside}{own}")
            elif own == key:
                raise ValueError(f"{inside}{key} is missing")
    elif isinstance(expected, list):
        if not isinstance(content, list | tuple):
            raise ValueError(f"{name} should be a list")
        for item in content:
            check_types(item, expected[0], name)
    else:
        allowed = (int, float) if expected is float else (expected,)
        is_finite = not isinstance(content, int | float) or abs(content) < 1e300
        if type(content) not in allowed or not is_finite:
            raise ValueError(f"{name} should be {_NAMES[expected]}")


def _check_limits(
    content: Any, most: float = float("inf"), check: Callable[[Any, str], None] | None = None
) -> None:
    """Raise ValueError for too many values, aliases counted as their content, or a deep nesting."""
    waiting, count = [(content, "", 0)], 0
    while waiting:
        node, name, depth = waiting.pop()
        if check:
            check(node, name)
        if not isinstance(node, dict | list):
            continue
        count += len(node)
        if depth >= _DEPTH or count > most:
            raise ValueError("it is nested too deeply" if depth >= _DEPTH else "too many values")
        items = node.items() if isinstance(node, dict) else enumerate(node)
        waiting += [(value, f"{name}.{key}".lstrip("."), depth + 1) for key, value in items]


def _check_setting(value: Any, name: str) -> None:
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name or 'it'} has a name that is not text")
    if not isinstance(value, dict | list | str | int | float | None):
        raise ValueError(f"{name} is a {type(value).__name__}, not a setting")
    if isinstance(value, str) and "${" in value:
        raise ValueError(f"{name} is an interpolation, but a run folder holds resolved values only")


def _whole_number(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError("a number has too many digits")
    return int(digits)


def _reason(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    text = getattr(error, "problem", None) or first_line(error)
    return f"line {mark.line + 1}: {text}" if mark else text


def _number(loader: Any, node: Any) -> Any:
    """Construct a number; Python takes very long for one of very many digits."""
    if len(node.value) > _DIGITS:
        raise ValueError("a number has too many digits")
    kind = node.tag.rpartition(":")[2]
    return getattr(yaml.SafeLoader, f"construct_yaml_{kind}")(loader, node)


def _loader(base: Any) -> Any:
    """Return a loader of what `OmegaConf.to_yaml` writes: 1e-3 is a number, and a date is text.

    It does not merge mappings (`<<`), which could make a small file very large.
    """
    loader: Any = type("Loader", (base,), {"flatten_mapping": lambda self, node: None})
    loader.yaml_implicit_resolvers = {
        first: [pair for pair in pairs if not re.search(r":(timestamp|merge|value)$", pair[0])]
        for first, pairs in base.yaml_implicit_resolvers.items()
    }
    loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9_]+)[eE][-+]?[0-9]+$"),
        list("-+0123456789."),
    )
    for kind in ("int", "float"):
        loader.add_constructor(f"tag:yaml.org,2002:{kind}", _number)
    return loader


_LOADER = _loader(yaml.SafeLoader)
#: The C parser, where PyYAML has it: a multirun may have a thousand configurations.
_FAST_LOADER = _loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader))
