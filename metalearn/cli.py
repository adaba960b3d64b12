"""The command line: picks the verb, composes `conf/`, and turns a user's mistake into one line and exit code 2."""

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from metalearn import __version__, help_texts, interrupts
from metalearn.errors import RunFailed, UserError, first_line

# Nothing heavy is imported here: `metalearn --help` must answer at once.


def main() -> None:
    """Entry point of the `metalearn` command."""
    words = sys.argv[1:]
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        interrupts.listen()
        code = _dispatch(words)
        sys.stdout.flush()
        _leave_siblings(code)
        sys.exit(code)
    except BrokenPipeError:  # the reader has left, as in `metalearn list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except interrupts.Stopped as stopped:
        if _rank() == 0:
            print(f"metalearn: {stopped}", file=sys.stderr)
        sys.exit(stopped.exit_code)
    except Exception as error:
        error = _told(error)
        failure = _exit_code(error)
        if debug or failure is None:
            raise
        if _rank() == 0:
            print(f"metalearn: {error}", file=sys.stderr)
        sys.exit(failure)


def _leave_siblings(code: int) -> None:
    """Ends one of several processes at once: the threads of torch.distributed now and then outlive the interpreter's
    orderly end, which aborts the process (torch 2.15: "terminate called without an active exception")."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stderr.flush()
        os._exit(code)


def _exit_code(error: Exception) -> int | None:
    """2 for a user's mistake, 1 for a run that could not go on, None for a defect of ours."""
    return 2 if isinstance(error, UserError) else 1 if isinstance(error, RunFailed) else None


def _told(error: Exception) -> Exception:
    """The error; as a failure of the run where it is that memory did not suffice, wherever that was."""
    if isinstance(error, RuntimeError | MemoryError):
        from metalearn.engine.memory import ran_out

        if ran_out(error):
            return RunFailed(
                "out of memory outside of a step; try smaller pictures (dataset.image_size), fewer filters or episodes"
            )
    return error


def _dispatch(words: list[str]) -> int:
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
        print("metalearn list\n\nShows algorithms, data sets, backbones and experiments, with one line each.")
        return 0
    if words:
        raise UserError(f"list {words[0]}: list takes no arguments")
    from metalearn.composition import families, options

    lines = options("algo")
    for family, names in families().items():
        print(f"algo=    {help_texts.FAMILIES.get(family, family)}")
        for name in names:
            print(f"  {name:<16} {lines[name]}")
    for group in ("dataset", "backbone", "episode", "experiment"):
        print(f"{group}=")
        for name, line in options(group).items():
            print(f"  {name:<16} {line}")
    return 0


def _completion(words: list[str]) -> int:
    import re

    asked = next((word for word in words if not word.startswith("-") and word != "train"), "")
    if not re.fullmatch(r"(install|uninstall|query)=(bash|zsh|fish)", asked):
        raise UserError(f"-sc {asked}: should be install=bash, uninstall=bash or query=bash (or zsh, fish)")
    # Hydra completes the words after the program's name; the verb is ours.
    words = [word for word in words if word != "train"]
    line = os.environ.get("COMP_LINE", "")
    os.environ["COMP_LINE"] = line.replace("metalearn train", "metalearn", 1)
    _hydra_main(lambda config: None, words)
    return 0


def _train(words: list[str]) -> int:
    if _wants_help(words):
        from metalearn.composition import options

        groups = "".join(
            f"  {group + '=':<12}{', '.join(options(group))}\n"
            for group in ("algo", "dataset", "backbone", "episode", "logger", "experiment")
        )
        print(help_texts.TRAIN.format(groups=groups), end="")
        return 0
    overrides, flags, searched = _parsed(words)
    if any(flag in _SHOW for flag in flags):
        from metalearn.composition import composed

        composed(overrides + searched)
        _hydra_main(_shows_only, [*flags, *overrides, *searched])
        return 0
    folder, multirun = _trained(overrides, flags, searched)
    if not multirun:
        return 0
    from metalearn import report
    from metalearn.verbs.train import summarise

    return 1 if summarise(folder, report.console()) else 0


def _trained(overrides: list[str], flags: list[str], searched: list[str]) -> tuple[Path, bool]:
    """Trains what a parsed command line says. Returns: the folder of the run or multirun, and whether it is the latter."""
    from metalearn import composition

    if multirun := any(flag in ("-m", "--multirun") for flag in flags):
        _check_multirun(overrides + searched)
        overrides_alone = [word for word in overrides if not _is_sweep(word)]
    else:
        _check(composition.composed(overrides + searched))
        overrides_alone = overrides
    if multirun and "RANK" in os.environ:
        raise UserError("--multirun: a sweep runs one process at a time; start torchrun without it")
    if _rank() > 0:
        _follow(overrides + searched)
    hydra = composition.composed(overrides_alone + searched, with_hydra=True).hydra
    folder = Path(hydra.sweep.dir if multirun else hydra.run.dir)
    created = _made(folder)
    # The folder is settled here once, since its name carries the time.
    where = f"hydra.{'sweep' if multirun else 'run'}.dir={_quoted(str(folder))}"
    job = _Job(multirun)
    try:
        _hydra_main(job, [*flags, *overrides, *searched, where])
    finally:
        for path in reversed(created):
            _remove_empty(path)
    if job.error is not None:
        raise job.error
    return folder, multirun


def _rank() -> int:
    """The number torchrun gave this process; 0 leads, and alone prints and writes."""
    return int(os.environ.get("RANK", "0"))


def _follow(overrides: list[str]) -> NoReturn:
    """Computes what the leading process of several asks for, writes nothing, and is done."""
    from metalearn import composition
    from metalearn.verbs.train import RESULT_FILE, follow

    config = composition.composed(overrides, with_hydra=True)
    folder = Path(config.hydra.run.dir)
    finished = config.resume == "auto" and (folder / RESULT_FILE).exists()
    if not finished:
        follow(composition.composed(overrides), folder)
    _leave_siblings(0)
    sys.exit(0)


#: Hydra's options that print something and start nothing.
_SHOW = ("--cfg", "-c", "--info", "-i", "--hydra-help")


#: Hydra's options that want one of these words.
_CFG, _INFO = ("job", "hydra", "all"), ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_CHOICES = {"--cfg": _CFG, "-c": _CFG, "--info": _INFO, "-i": _INFO}


def _shows_only(config: Any) -> None:
    raise AssertionError("Hydra was asked to print, not to run")


def _check(config: Any) -> None:
    """All that can be known before data are read."""
    from metalearn import build
    from metalearn.config import checked

    build.check(checked(config))


def _check_multirun(overrides: list[str]) -> None:
    """A mistyped name ends a multirun before it begins; a run that is impossible only fails itself.

    Raises: UserError when a name is unknown, or when no run at all is possible.
    """
    from metalearn import composition

    first: UserError | None = None
    possible = False
    for run in composition.combinations(overrides):
        composed = composition.composed(run)
        try:
            _check(composed)
            possible = True
        except UserError as error:
            first = first or error
    if first and not possible:
        raise first


class _Job:
    """The function Hydra calls for each run; picklable, so that launchers can send it to other processes."""

    def __init__(self, multirun: bool) -> None:
        self.multirun = multirun
        self.error: Exception | None = None
        self.__name__ = "metalearn"

    def __call__(self, config: Any) -> float:
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import OmegaConf

        from metalearn import report
        from metalearn.verbs import train

        settings = HydraConfig.get()
        folder = Path(settings.runtime.output_dir)
        choices: Any = settings.runtime.choices
        name = f"{choices.algo} {choices.dataset}"
        console = report.console()
        overrides = list(settings.overrides.task)
        if self.multirun:
            console.print(f"[bold]{settings.job.num}: {' '.join(overrides)}[/bold]", highlight=False, soft_wrap=True)
            train.note_command(folder, name, overrides)
            (folder / train.ERROR_FILE).unlink(missing_ok=True)
            # Given again with the same hydra.sweep.dir, a multirun skips what is finished and goes on with what is not.
            config = OmegaConf.merge(config, {"resume": "auto"})
        try:
            return train.train(config, _relative(folder), name, overrides, console)
        except Exception as error:
            # Hydra prints lines of its own about a failing job, so the error of a single run goes around it; one failed
            # run of several must not end the others: it is named in the table, and the sweeper is told the worst score.
            if self.multirun:
                line = _noted(error, folder / train.ERROR_FILE)
                console.print(f"[red]failed: {line}[/red]", highlight=False)
            else:
                self.error = error
            return _worst_score(config)


def _noted(error: Exception, path: Path) -> str:
    """Writes why a run of a multirun failed, with the traceback of a defect of ours beside it. Returns: the line."""
    error = _told(error)
    line = first_line(error)
    if _exit_code(error) is None:
        import traceback

        line = f"{type(error).__name__}: {line}"
        path.with_name("traceback.txt").write_text(traceback.format_exc())
    path.write_text(line + "\n")
    return line


def _worst_score(config: Any) -> float:
    from metalearn.config import component
    from metalearn.types import SCORES

    try:
        score = SCORES[component(config.dataset, "dataset").target]
    except UserError:
        return float("-inf")
    return float("-inf") if score.higher_is_better else float("inf")


def _hydra_main(job: Any, words: list[str]) -> None:
    """Hydra's main for the entry point in `conf/`, its errors as exceptions."""
    import hydra

    from metalearn.composition import conf_dir

    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = ["metalearn", *words]
    hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(job)()


def _parsed(words: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Overrides, Hydra's flags, and extra places to look for configuration files."""
    overrides: list[str] = []
    flags: list[str] = []
    searched: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if word in _CHOICES:
            if not queue or queue[0] not in _CHOICES[word]:
                raise UserError(f"{word} {queue[0] if queue else ''}: should be one of {', '.join(_CHOICES[word])}")
            flags += [word, queue.pop(0)]
        elif word in ("--config-dir", "-cd"):
            if not queue or not Path(queue[0]).is_dir():
                raise UserError(f"{word} {queue[0] if queue else ''}: should name a folder of configuration files")
            searched.append(f"hydra.searchpath=[{_quoted(f'file://{Path(queue.pop(0)).absolute()}')}]")
        elif word in ("-m", "--multirun", "--resolve", "--hydra-help"):
            flags.append(word)
        elif word.startswith("-"):
            raise UserError(f"{word}: there is no such option; see metalearn train --help")
        elif "=" not in word and not word.startswith("~"):
            raise UserError(f"{word}: settings are written key=value, like algo=maml or train.steps=1000")
        else:
            overrides.append(word)
    return overrides, flags, searched


def _is_sweep(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(override).is_sweep_override()


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _relative(folder: Path) -> Path:
    """The folder as people name it: relative where it lies below the working directory."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def _made(folder: Path) -> list[Path]:
    """Makes a folder and returns what had to be made for it, outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        for path in missing:
            _remove_empty(path)
        raise UserError(
            f"output folder {folder} cannot be written ({error.strerror}); choose another hydra.run.dir"
        ) from None
    return missing[::-1]


def _remove_empty(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:
        pass


def _resume(words: list[str]) -> int:
    if _wants_help(words) or not words:
        print(help_texts.RESUME, end="")
        return 0 if words else 2
    if len(words) != 1 or words[0].startswith("-"):
        raise UserError(f"resume {words[-1]}: resume takes one folder, that of a run")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("resume: with torchrun, give the run's own command again with hydra.run.dir=… and resume=auto")
    from metalearn import report
    from metalearn.verbs.train import resume

    resume(Path(words[0]), report.console())
    return 0


def _doctor(words: list[str]) -> int:
    if _wants_help(words):
        print(help_texts.DOCTOR, end="")
        return 0
    overrides, flags, searched = _parsed(words)
    if (
        flags
        or searched
        or any(word.partition("=")[0] not in ("data_dir", "cache_dir", "device") for word in overrides)
    ):
        raise UserError("doctor: takes data_dir=, cache_dir= and device= alone")
    from metalearn import report
    from metalearn.verbs.doctor import doctor

    return 0 if doctor(overrides, report.console()) else 1


def _evaluate(words: list[str]) -> int:
    if _wants_help(words):
        print(help_texts.EVALUATE, end="")
        return 0
    overrides, flags, searched = _parsed(words)
    run, split, curve = _taken(overrides, "run"), _taken(overrides, "split", "test"), _taken(overrides, "curve")
    if run is None or flags or searched:
        raise UserError("evaluate: takes run=<folder> and key=value settings; see metalearn evaluate --help")
    from metalearn import report
    from metalearn.verbs.evaluate import evaluate

    evaluate(Path(run), overrides, split, curve, report.console())
    return 0


def _compare(words: list[str]) -> int:
    if _wants_help(words) or not words:
        print(help_texts.COMPARE, end="")
        return 0 if words else 2
    words = list(words)
    out = _taken(words, "out")
    if wrong := [word for word in words if not Path(word).is_dir()]:
        raise UserError(f"{wrong[0]}: there is no such folder; compare takes folders of runs, and out=<folder>")
    from metalearn import report
    from metalearn.verbs.compare import compare

    compare([Path(word) for word in words], None if out is None else Path(out), report.console())
    return 0


def _reproduce(words: list[str]) -> int:
    from metalearn.verbs import reproduce

    if _wants_help(words) or not words:
        experiments = "\n".join(f"  {name:<24} {line}" for name, line in reproduce.experiments().items())
        print(help_texts.REPRODUCE.format(experiments=experiments), end="")
        return 0 if words else 2
    names = [word for word in words if "=" not in word]
    if len(names) != 1:
        raise UserError("reproduce: takes the name of one experiment; see metalearn reproduce --help")
    name, rest = names[0], [word for word in words if "=" in word]
    budget = _taken(rest, "budget", "paper")
    recipe = reproduce.Recipe(name, budget)
    overrides, flags, searched = _parsed(rest)
    if flags or searched:
        raise UserError(f"reproduce: takes key=value settings only, not {(flags + searched)[0]}")
    from metalearn import report

    console = report.console()
    from metalearn import composition

    settings = recipe.overrides(overrides)
    _check(composition.composed(settings))
    report.print_line(console, recipe.announcement())
    folder, _ = _trained(settings, [], [])
    return 0 if recipe.verdict(folder, console) else 1


def _taken(overrides: list[str], key: str, otherwise: Any = None) -> Any:
    """Takes `key=…`, which is the verb's own and not Hydra's, out of the overrides."""
    found = [word for word in overrides if word.startswith(f"{key}=")]
    if len(found) > 1:
        raise UserError(f"{found[1]}: {key}= stands there twice")
    for word in found:
        overrides.remove(word)
    return found[0].partition("=")[2] if found else otherwise
