"""The metalearn command: find the command's file, run it, and report errors in one line."""

import atexit
import gc
import importlib
import os
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from metalearn import __version__
from metalearn.cli._arguments import take_plugins
from metalearn.system import output, signals
from metalearn.system.errors import UserError, as_failure, exit_code, leave_unread, nearest

# Nothing heavy is imported here: `metalearn --help` must answer at once.

_HELP = """metalearn {version}: few-shot and meta-learning experiments

usage: metalearn <command> [key=value …]

{commands}
  metalearn <command> --help   explain the command
  --debug                      show the traceback of an error
  --version                    print the version

examples
  metalearn train algo=maml dataset=omniglot          meta-train, validate and test
  metalearn evaluate run=<folder> episode.shot=5      test a trained run again
  metalearn compare <folder> <folder>                 one table, with significance
  metalearn reproduce maml_omniglot_5w1s budget=smoke
"""


def main() -> None:
    """Run the `metalearn` command."""
    # Threads of torch that wait for each other in a busy loop lose most of their time to it if
    # another process uses the cores. It has an effect only before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    gc.set_threshold(100_000)  # what is imported stays: to look at it often costs 0.6 s
    atexit.register(_skip_collection)
    output.prepare_streams()
    words = sys.argv[1:]
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        signals.listen()
        code = _dispatch(words)
        sys.stdout.flush()
        exit_siblings(code)
        sys.exit(code)
    except BrokenPipeError:  # the reader has exited, as in `metalearn list | head -1`
        leave_unread(sys.stdout)
        sys.exit(141)
    except signals.Stopped as stopped:
        _print_error(stopped)
        sys.exit(stopped.exit_code)
    except Exception as error:
        error = as_failure(error)
        code_of_error = exit_code(error)
        if debug or code_of_error is None:
            raise
        _print_error(error)
        sys.exit(code_of_error)


def _skip_collection() -> None:
    """Free nothing at exit: to look for it takes 0.7 s. Triton would report it as leaks."""
    if "triton" not in sys.modules:
        gc.freeze()


def commands() -> list[str]:
    """Return the names of the commands: the files of this folder that are not private."""
    names = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    return [name for name in names if not name.startswith("_") and name != "main"]


def rank() -> int:
    """Return the number that torchrun gave this process; 0 leads, and alone prints and writes."""
    return int(os.environ.get("RANK", "0"))


def exit_siblings(code: int) -> None:
    """Exit one of several processes at once.

    Threads of torch.distributed sometimes outlive the interpreter's regular exit, which aborts the
    process (torch 2.15: "terminate called without an active exception").
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stderr.flush()
        os._exit(code)


def _command(name: str) -> ModuleType:
    return importlib.import_module(f"metalearn.cli.{name}")


def _print_error(error: BaseException) -> None:
    """Print why the command ends, in the leading process only."""
    output.Unfailing(sys.stdout).flush()  # else what it holds fails again at exit
    if rank() == 0:
        print(f"metalearn: {error}", file=sys.stderr, flush=True)


def _dispatch(words: list[str]) -> int:
    words = take_plugins(words)
    if any(word in ("-sc", "--shell-completion") for word in words):
        from metalearn.cli._completion import complete

        complete(words, {name: _command(name).TAKES for name in commands()})
        return 0
    if not words or words[0] in ("-h", "--help", "help"):
        summaries = {name: str(_command(name).__doc__).partition("\n")[0] for name in commands()}
        lines = (f"  {name:<12}{summary}\n" for name, summary in summaries.items())
        print(_HELP.format(version=__version__, commands="".join(lines)), end="")
        return 0
    name, arguments = words[0], words[1:]
    if name in ("--version", "version"):
        print(f"metalearn {__version__}")
        return 0
    if name not in commands():
        hint = nearest(name, commands()) or f"; there are {', '.join(commands())}"
        raise UserError(f"{name}: there is no such command{hint}")
    if any(word in ("-h", "--help") for word in arguments):
        print(help_of(name), end="")
        return 0
    code: int = _command(name).main(arguments)
    return code


def help_of(name: str) -> str:
    """Return what `metalearn <name> --help` prints."""
    return str(_command(name).HELP.format_map(_Choices()))


class _Choices(dict[str, Any]):
    """Fields of a command's HELP: a configuration group's choices, or `reproductions`."""

    def __missing__(self, field: str) -> str:
        from metalearn.config.choices import options, reproductions

        return ", ".join(reproductions() if field == "reproductions" else options(field))
