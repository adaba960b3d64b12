"""The command line: picks the verb, composes `conf/`, and turns a user's mistake into one line and exit code 2."""

import os
import sys
from pathlib import Path
from typing import Any

from metalearn import __version__
from metalearn.cli import help_texts, launch
from metalearn.system import signals
from metalearn.system.errors import UserError, leave_unread

# Nothing heavy is imported here: `metalearn --help` must answer at once.


def main() -> None:
    """Entry point of the `metalearn` command."""
    words = sys.argv[1:]
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        signals.listen()
        code = _dispatch(words)
        sys.stdout.flush()
        launch.leave_siblings(code)
        sys.exit(code)
    except BrokenPipeError:  # the reader has left, as in `metalearn list | head -1`
        leave_unread(sys.stdout)
        sys.exit(141)
    except signals.Stopped as stopped:
        _say(stopped)
        sys.exit(stopped.exit_code)
    except Exception as error:
        error = launch.told(error)
        failure = launch.exit_code(error)
        if debug or failure is None:
            raise
        _say(error)
        sys.exit(failure)


def _say(error: BaseException) -> None:
    """Says, once for all processes, why the command ends."""
    if launch.rank() == 0:
        try:
            print(f"metalearn: {error}", file=sys.stderr, flush=True)
        except OSError:  # nobody reads any more; what is left unsaid must not change the exit code
            leave_unread(sys.stderr)


def _dispatch(words: list[str]) -> int:
    words = launch.take_plugins(words)
    if any(word in ("-sc", "--shell-completion") for word in words):
        return _completion(words)
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_texts.MAIN, end="")
        return 0
    verb, rest = words[0], words[1:]
    if verb == "--version":
        print(f"metalearn {__version__}")
        return 0
    verbs = {"train": _train, "evaluate": _evaluate, "compare": _compare, "reproduce": _reproduce,
             "resume": _resume, "doctor": _doctor, "list": _list}  # fmt: skip
    if verb not in verbs:
        import difflib

        close = difflib.get_close_matches(verb, verbs, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(verbs)}"
        raise UserError(f"{verb}: there is no such verb; {hint}")
    return verbs[verb](rest)


def _wants_help(words: list[str]) -> bool:
    return any(word in ("-h", "--help") for word in words)


def _list(words: list[str]) -> int:
    if _wants_help(words):
        print(
            "metalearn list\n\nShows algorithms, datasets, backbones, episodes, optimisers, losses, augmentations and experiments, with one line each."
        )
        return 0
    if words:
        raise UserError(f"list {words[0]}: list takes no arguments")
    from metalearn.config.composition import families, options

    lines = options("algo")
    for family, names in families().items():
        print(f"algo=    {help_texts.FAMILIES.get(family, family)}")
        for name in names:
            print(f"  {name:<16} {lines[name]}")
    for group in ("dataset", "backbone", "episode", "optimiser", "loss", "augment", "experiment"):
        print(f"{group}=")
        for name, line in options(group).items():
            print(f"  {name:<16} {line}")
    return 0


def _completion(words: list[str]) -> int:
    import re

    asked = next((word for word in words if not word.startswith("-") and word != "train"), "")
    if not re.fullmatch(r"(install|uninstall|query)=(bash|zsh|fish)", asked):
        raise UserError(
            f"-sc {asked}: should be install=bash, uninstall=bash or query=bash (or zsh, fish)"
        )
    # Hydra completes the words after the program's name; the verb is ours.
    words = [word for word in words if word != "train"]
    line = os.environ.get("COMP_LINE", "")
    os.environ["COMP_LINE"] = line.replace("metalearn train", "metalearn", 1)
    launch.hydra_main(lambda config: None, words)
    return 0


def _train(words: list[str]) -> int:
    if _wants_help(words):
        from metalearn.config.composition import options

        groups = "".join(
            f"  {group + '=':<12}{', '.join(options(group))}\n"
            for group in (
                "algo",
                "dataset",
                "backbone",
                "episode",
                "optimiser",
                "loss",
                "augment",
                "logger",
                "experiment",
            )
        )
        print(help_texts.TRAIN.format(groups=groups), end="")
        return 0
    line = launch.parsed(words)
    if line.only_shows:
        launch.show(line)
        return 0
    folder, multirun = launch.trained(line)
    if not multirun:
        return 0
    from metalearn.report.console import open_console
    from metalearn.run.train import summarise

    return 1 if summarise(folder, open_console()) else 0


def _resume(words: list[str]) -> int:
    if _wants_help(words) or not words:
        print(help_texts.RESUME, end="")
        return 0 if words else 2
    if len(words) != 1 or words[0].startswith("-"):
        raise UserError(f"resume {words[-1]}: resume takes one folder, that of a run")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "resume: with torchrun, give the run's own command again with hydra.run.dir=… and resume=auto"
        )
    from metalearn.report.console import open_console
    from metalearn.run.train import resume

    resume(Path(words[0]), open_console())
    return 0


def _doctor(words: list[str]) -> int:
    if _wants_help(words):
        print(help_texts.DOCTOR, end="")
        return 0
    overrides = launch.parsed(words).no_flags("doctor").overrides
    if any(word.partition("=")[0] not in ("data_dir", "cache_dir", "device") for word in overrides):
        raise UserError("doctor: takes data_dir=, cache_dir= and device= alone")
    from metalearn.cli.doctor import doctor
    from metalearn.report.console import open_console

    return 0 if doctor(overrides, open_console()) else 1


def _evaluate(words: list[str]) -> int:
    if _wants_help(words):
        print(help_texts.EVALUATE, end="")
        return 0
    overrides = launch.parsed(words).no_flags("evaluate").overrides
    run, split, curve = (
        _taken(overrides, "run"),
        _taken(overrides, "split", "test"),
        _taken(overrides, "curve"),
    )
    if run is None:
        raise UserError(
            "evaluate: takes run=<folder> and key=value settings; see metalearn evaluate --help"
        )
    from metalearn.report.console import open_console
    from metalearn.run.evaluate import evaluate

    evaluate(Path(run), overrides, split, curve, open_console())
    return 0


def _compare(words: list[str]) -> int:
    if _wants_help(words) or not words:
        print(help_texts.COMPARE, end="")
        return 0 if words else 2
    words = list(words)
    out = _taken(words, "out")
    if wrong := [word for word in words if not Path(word).is_dir()]:
        raise UserError(
            f"{wrong[0]}: there is no such folder; compare takes folders of runs, and out=<folder>"
        )
    from metalearn.cli.compare import compare
    from metalearn.report.console import open_console

    compare([Path(word) for word in words], None if out is None else Path(out), open_console())
    return 0


def _reproduce(words: list[str]) -> int:
    from metalearn.cli import reproduce

    if _wants_help(words) or not words:
        experiments = "\n".join(
            f"  {name:<24} {line}" for name, line in reproduce.experiments().items()
        )
        print(help_texts.REPRODUCE.format(experiments=experiments), end="")
        return 0 if words else 2
    names = [word for word in words if "=" not in word]
    if len(names) != 1:
        raise UserError(
            "reproduce: takes the name of one experiment; see metalearn reproduce --help"
        )
    name, rest = names[0], [word for word in words if "=" in word]
    budget = _taken(rest, "budget", "paper")
    recipe = reproduce.Recipe(name, budget)
    given = launch.parsed(rest).no_flags("reproduce").overrides
    line = launch.Words(recipe.overrides(given), [], [])
    launch.check(line)
    from metalearn.report.console import open_console, print_line

    console = open_console()
    print_line(console, recipe.announcement())
    folder, _ = launch.trained(line)
    return recipe.verdict(folder, console)


def _taken(overrides: list[str], key: str, otherwise: Any = None) -> Any:
    """Takes `key=…`, which is the verb's own and not Hydra's, out of the overrides."""
    found = [word for word in overrides if word.startswith(f"{key}=")]
    if len(found) > 1:
        raise UserError(f"{found[1]}: {key}= stands there twice")
    for word in found:
        overrides.remove(word)
    return found[0].partition("=")[2] if found else otherwise
