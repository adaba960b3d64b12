"""Shell completion: commands, settings and their values, experiments, and paths."""

import contextlib
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from metalearn.config import checking, choices, composition, paths, roles
from metalearn.config.components import Setting
from metalearn.system.errors import UserError

#: For each shell, a script that asks `metalearn -sc query=<shell>` about the line so far. bash
#: replaces only what follows the last = or : of a word.
_SCRIPTS = {
    "bash": r"""_metalearn() {
    local IFS=$'\n' line="${COMP_LINE:0:COMP_POINT}" word
    word="${line##* }"
    COMPREPLY=($(COMP_LINE="$line" metalearn -sc query=bash 2>/dev/null))
    COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*[=:]}"}"}")
}
complete -o nospace -F _metalearn metalearn""",
    "zsh": r"""_metalearn() {
    local -a words_found
    words_found=("${(@f)$(COMP_LINE="${BUFFER[1,CURSOR]}" metalearn -sc query=zsh 2>/dev/null)}")
    compadd -Q -S '' -a words_found
}
compdef _metalearn metalearn""",
    "fish": r"""function _metalearn
    COMP_LINE=(commandline -cp) metalearn -sc query=fish 2>/dev/null
end
complete -c metalearn -f -a '(_metalearn)'""",
}
_REMOVALS = {
    "bash": "complete -r metalearn",
    "zsh": "compdef -d metalearn",
    "fish": "complete -e -c metalearn",
}


def complete(words: list[str], commands: dict[str, tuple[str, ...]]) -> None:
    """Print a completion script, its removal, or what completes the line in COMP_LINE.

    `commands` has what each command takes, as its file's `TAKES` has it. Raise UserError for a
    shell that is not supported.
    """
    action = next((word for word in words if not word.startswith("-")), "")
    if not re.fullmatch(r"(install|uninstall|query)=(bash|zsh|fish)", action):
        raise UserError(
            f"-sc {action}: should be install=bash, uninstall=bash or query=bash (or zsh, fish)"
        )
    verb, _, shell = action.partition("=")
    if verb == "query":
        for candidate in candidates(os.environ.get("COMP_LINE", ""), commands):
            print(candidate)
    else:
        print(_SCRIPTS[shell] if verb == "install" else _REMOVALS[shell])


def candidates(line: str, commands: dict[str, tuple[str, ...]]) -> list[str]:
    """Return the words that complete the last word of a command line; [] if nothing is known."""
    try:
        before, word = _split(line)
    except ValueError:  # an open quote
        return []
    if not before:
        return _starting(word, [f"{name} " for name in commands])
    found: list[str] = []
    for taken in commands.get(before[0], ()):
        key, _, values = taken.rpartition("=")
        if taken == "{settings}":
            found += _settings(word, before[1:])
        elif key and not word.startswith(f"{key}="):
            found += _starting(word, [f"{key}="])
        else:
            start = f"{key}=" if key else ""
            found += [start + one for one in _values(word[len(start) :], values)]
    return sorted(set(found))


def _split(line: str) -> tuple[list[str], str]:
    """Return the complete words after `metalearn`, and the last one, which may be empty."""
    words = shlex.split(line)[1:]
    return (words, "") if not words or line[-1].isspace() else (words[:-1], words[-1])


def _starting(start: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if word.startswith(start)]


def _values(start: str, values: str) -> list[str]:
    """Complete a value: a folder, a dataset, an experiment, or one of several words."""
    if values == "{folder}":
        return _paths(start)
    known: Iterable[str] = values.split("|")
    if values == "{dataset}":
        known = choices.options("dataset")
    elif values == "{experiment}":
        known = choices.reproductions()
    return _starting(start, [f"{value} " for value in known])


def _paths(start: str) -> list[str]:
    """Complete a path, with special characters escaped for the shell."""
    folder, _, name = start.rpartition("/")
    found = []
    with contextlib.suppress(OSError):
        for path in sorted(Path(f"{folder}/" if "/" in start else ".").expanduser().iterdir()):
            if path.name.startswith(name) and (name or not path.name.startswith(".")):
                whole = f"{folder}/{path.name}" if "/" in start else path.name
                ending = "/" if path.is_dir() else " "
                found.append(re.sub(r"([^\w@%+:,./=~-])", r"\\\1", whole) + ending)
    return found


def _settings(word: str, others: list[str]) -> list[str]:
    """Complete `key=value`: groups and their choices, settings and their values."""
    key, is_given, value = word.partition("=")
    key = key.lstrip("+")
    groups = choices.groups()
    if is_given and key in groups:
        return [f"{key}={one} " for one in _starting(value, choices.options(key))]
    if is_given and key in paths.PATHS:
        return [f"{key}={path}" for path in _paths(value)]
    settings = _known(others, groups)
    if is_given:
        known: Iterable[str] = ()
        if setting := settings.get(key):
            is_flag = setting.kind is bool
            known = ("true", "false") if is_flag else setting.rule.get("choices", ())
        return [f"{key}={one} " for one in _starting(value, known)]
    names = [*groups, *paths.PATHS, *(name for name in settings if "._" not in name)]
    return _starting(word, [f"{name}=" for name in names])


def _known(others: list[str], groups: list[str]) -> dict[str, Setting]:
    """Return all settings of the run that the other words describe."""
    chosen = [word for word in others if word.partition("=")[0] in groups]
    for words in (chosen, []):  # a word may be wrong
        with contextlib.suppress(UserError):
            config = checking.check_config(composition.compose_config(words))
            return roles.roles(checking.plain(config))
    return {}
