"""Parse the arguments of a command."""

import contextlib
import dataclasses
import datetime
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from metalearn.system.errors import UserError, nearest

#: Hydra's options that print something and start nothing, and the words that must follow them.
_CFG, _INFO = (
    ("job", "hydra", "all"),
    ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
)
_PRINTS: dict[str, tuple[str, ...]] = {
    "--cfg": _CFG, "-c": _CFG, "--info": _INFO, "-i": _INFO, "--hydra-help": (),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Parsed arguments: overrides, Hydra's options, and additional configuration folders."""

    overrides: list[str]
    options: list[str] = dataclasses.field(default_factory=list)
    folders: list[Path] = dataclasses.field(default_factory=list)

    @property
    def settings(self) -> list[str]:
        """Return everything that Hydra composes."""
        from metalearn.config import composition

        return composition.completed(self.overrides, self.folders)

    @property
    def is_multirun(self) -> bool:
        """Return True for a sweep over several values."""
        return any(option in ("-m", "--multirun") for option in self.options)

    @property
    def only_prints(self) -> bool:
        """Return True if Hydra should print something and start nothing."""
        return any(option in _PRINTS for option in self.options)


def parse(words: list[str]) -> Arguments:
    """Parse the arguments of `metalearn train`: settings and Hydra's options, else UserError."""
    arguments = Arguments([])
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if choices := _PRINTS.get(word):
            if not queue or queue[0] not in choices:
                value = queue[0] if queue else ""
                raise UserError(f"{word} {value}: should be one of {', '.join(choices)}")
            arguments.options.extend([word, queue.pop(0)])
        elif word in ("--config-dir", "-cd"):
            if not queue or not os.path.isdir(queue[0]):
                value = queue[0] if queue else ""
                raise UserError(f"{word} {value}: should name a folder of configuration files")
            arguments.folders.append(Path(queue.pop(0)).absolute())
        elif word in ("-m", "--multirun", "--resolve", "--hydra-help"):
            arguments.options.append(word)
        elif word.startswith("-"):
            raise UserError(f"{word}: there is no such option; see metalearn train --help")
        elif "=" not in word and not word.startswith("~"):
            raise UserError(
                f"{word}: settings are written key=value, like train.steps=1000 or episode.shot=5"
            )
        else:
            arguments.overrides.append(word)
    from metalearn.config import paths

    overrides = [paths.literal(word, arguments.is_multirun) for word in arguments.overrides]
    return dataclasses.replace(arguments, overrides=overrides)


def parse_settings(command: str, words: list[str]) -> list[str]:
    """Parse the arguments of a command that takes key=value settings only, else raise UserError."""
    arguments = parse(words)
    if other := arguments.options + ["--config-dir"] * bool(arguments.folders):
        raise UserError(f"{command}: takes key=value settings only, not {other[0]}")
    own = keys(importlib.import_module(f"metalearn.cli.{command}").TAKES)
    for word in arguments.overrides:
        key = word.partition("=")[0]
        if key not in own and (hint := nearest(key, own, similarity=0.75)):
            raise UserError(f"{word}: {command} takes no such argument{hint}")
    return arguments.overrides


def take(words: list[str], key: str, default: str | None = None) -> str | None:
    """Remove `key=…`, which the command reads itself, from its arguments; return its value.

    Raise UserError if it is given twice.
    """
    given = [word for word in words if word.startswith(f"{key}=")]
    if len(given) > 1:
        raise UserError(f"{given[1]}: {key}= is given twice")
    for word in given:
        words.remove(word)
    return given[0].partition("=")[2] if given else default


def keys(takes: Iterable[str]) -> list[str]:
    """Return the keys of the `key=…` that a command takes, from its `TAKES`."""
    return [one.partition("=")[0] for one in takes if "=" in one]


def take_folders(words: list[str]) -> list[str]:
    """Remove folders, given as `<folder>` or `run=<folder>,…`, from arguments; return them."""
    folders, rest = [], []
    for word in words:
        if word[:1] != "-" and ("=" not in word or os.path.isdir(word)):
            folders.append(word)
        elif word.startswith("run="):
            folders += listed(word.removeprefix("run="))
        else:
            rest.append(word)
    words[:] = rest
    return folders


def listed(text: str) -> list[str]:
    """Return the items of a list with commas; a path that exists, perhaps with `:…`, is one."""
    name, _, split = text.rpartition(":")
    if os.path.exists(text) or (os.path.exists(name) and "," not in split):
        return [text]
    return [word.strip(" '\"") for word in text.strip("[]").split(",") if word]


def output_folder(given: str | None, kind: str) -> Path:
    """Return the folder of `out=…`, by default outputs/<kind>/<time>."""
    time = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    return Path(given or f"outputs/{kind}/{time}").expanduser()


def with_json(run: Callable[[list[str], Any], dict[str, Any]]) -> Callable[[list[str]], int]:
    """Return the `main` of a command whose `run(arguments, console)` returns its JSON document.

    With `--json`, only the document is printed on stdout, the rest on standard error. The exit code
    is 1 if the document has "failures".
    """

    def main(args: list[str]) -> int:
        from metalearn.report.console import open_console

        words = [word for word in args if word != "--json"]
        is_json = len(words) < len(args)
        with contextlib.redirect_stdout(sys.stderr if is_json else sys.stdout):
            document = run(words, open_console())
        if is_json:
            print(json.dumps(document, indent=2))
        return 1 if document.get("failures") else 0

    return main


def take_plugins(words: list[str]) -> list[str]:
    """Import and allow the packages of `plugins=[package, …]`; return the other arguments.

    Raise UserError for a package that cannot be imported.
    """
    from metalearn.config import plugins

    rest = []
    for word in words:
        key, _, value = word.partition("=")
        if key.lstrip("+") != "plugins":
            rest.append(word)
            continue
        names = (name.strip(" '\"") for name in value.strip("[]").split(","))
        plugins.add([name for name in names if name])
    return rest
