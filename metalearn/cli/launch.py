"""From the words of a command line to runs under Hydra: parsed, checked before any data are read, started."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from metalearn.system.errors import RunFailed, UserError, first_line, of_system, ran_out

# Nothing heavy is imported here, as in cli.py.

#: Hydra's options that print something and start nothing.
_SHOW = ("--cfg", "-c", "--info", "-i", "--hydra-help")


#: Hydra's options that want one of these words.
_CFG, _INFO = (
    ("job", "hydra", "all"),
    ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
)
_CHOICES = {"--cfg": _CFG, "-c": _CFG, "--info": _INFO, "-i": _INFO}


@dataclasses.dataclass(frozen=True)
class Words:
    """A parsed command line: overrides, Hydra's flags, and more folders of configuration files."""

    overrides: list[str]
    flags: list[str]
    folders: list[Path]

    @property
    def settings(self) -> list[str]:
        """Everything that is composed."""
        from metalearn.config import composition, plugins

        return self.overrides + composition.search_path(self.folders + plugins.conf_dirs())

    @property
    def multirun(self) -> bool:
        return any(flag in ("-m", "--multirun") for flag in self.flags)

    @property
    def only_shows(self) -> bool:
        """Whether Hydra is to print something and start nothing."""
        return any(flag in _SHOW for flag in self.flags)

    def no_flags(self, verb: str) -> "Words":
        """Itself. Raises: UserError where there are flags, or extra places, which this verb does not take."""
        if other := self.flags + (["--config-dir"] if self.folders else []):
            raise UserError(f"{verb}: takes key=value settings only, not {other[0]}")
        return self


def parsed(words: list[str]) -> Words:
    """Raises: UserError for a word that is neither a setting nor one of Hydra's options."""
    overrides: list[str] = []
    flags: list[str] = []
    folders: list[Path] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if word in _CHOICES:
            if not queue or queue[0] not in _CHOICES[word]:
                raise UserError(
                    f"{word} {queue[0] if queue else ''}: should be one of {', '.join(_CHOICES[word])}"
                )
            flags += [word, queue.pop(0)]
        elif word in ("--config-dir", "-cd"):
            if not queue or not Path(queue[0]).is_dir():
                raise UserError(
                    f"{word} {queue[0] if queue else ''}: should name a folder of configuration files"
                )
            folders.append(Path(queue.pop(0)).absolute())
        elif word in ("-m", "--multirun", "--resolve", "--hydra-help"):
            flags.append(word)
        elif word.startswith("-"):
            raise UserError(f"{word}: there is no such option; see metalearn train --help")
        elif "=" not in word and not word.startswith("~"):
            raise UserError(
                f"{word}: settings are written key=value, like train.steps=1000 or episode.shot=5"
            )
        else:
            overrides.append(word)
    return Words(overrides, flags, folders)


def take_plugins(words: list[str]) -> list[str]:
    """Take `plugins=[package, …]` out of the words of a command line, and import and allow these packages.

    Raises:
        UserError: for a package that cannot be imported.
    """
    from metalearn.config import plugins

    for word in words:
        if word.startswith("plugins="):
            names = word.partition("=")[2].strip("[]")
            plugins.add(name.strip() for name in names.split(",") if name.strip())
    return [word for word in words if not word.startswith("plugins=")]


def check(words: Words) -> None:
    """Check all that can be known before data are read: names, types, impossible pairings.

    Raises:
        UserError: for the first mistake.
    """
    from metalearn.config import composition

    if words.multirun:
        _check_multirun(words.settings)
    else:
        _check(composition.composed(words.settings))


def trained(words: Words) -> tuple[Path, bool]:
    """Train what a command line says.

    Returns:
        The folder of the run or multirun, and whether it is the latter.
    """
    job = _Job(words.multirun)
    folder = (_start_multirun if words.multirun else _start_run)(words, job)
    if job.error is not None:
        raise job.error
    return folder, words.multirun


def _start_run(words: Words, job: "_Job") -> Path:
    """Compose once, check, and run under Hydra. Returns the folder of the run."""
    from hydra._internal.callbacks import Callbacks
    from hydra.core.utils import run_job
    from hydra.types import HydraContext, RunMode
    from omegaconf import open_dict

    from metalearn.config import composition

    config = composition.composed(words.settings, with_hydra=True)
    hydra = config.hydra
    _check_callbacks(hydra)
    if hydra.mode == RunMode.MULTIRUN:
        raise UserError("hydra.mode=MULTIRUN: a multirun is started with -m")
    _check(composition.without_hydra(config))
    folder = Path(hydra.run.dir)
    if rank() > 0:
        _follow(composition.without_hydra(config), folder)
    with open_dict(config):
        hydra.mode = RunMode.RUN
        hydra.run.dir = str(folder)  # settled once, since its name carries the time
    context = HydraContext(None, Callbacks())  # type: ignore[arg-type]  # a loader is for launchers
    with _folder(folder):
        run_job(job, config, "hydra.run.dir", None, context)  # type: ignore[arg-type]
    return folder


def _start_multirun(words: Words, job: "_Job") -> Path:
    """Check each value of each axis, and give the whole to Hydra's sweeper. Returns the folder of the multirun."""
    from metalearn.config import composition

    _check_multirun(words.settings)
    if "RANK" in os.environ:
        raise UserError("--multirun: a sweep runs one process at a time; start torchrun without it")
    alone = [word for word in words.settings if not composition.is_sweep(word)]
    hydra = composition.composed(alone, with_hydra=True).hydra
    _check_callbacks(hydra)
    folder = Path(hydra.sweep.dir)
    with _folder(folder):
        where = f"hydra.sweep.dir={composition.quoted(str(folder))}"
        hydra_main(job, [*words.flags, *words.settings, where])
    return folder


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Make a folder, and remove what stays empty of it."""
    created = _made(folder)
    try:
        yield
    finally:
        for path in reversed(created):
            _remove_empty(path)


def show(words: Words) -> None:
    """What Hydra prints of a configuration."""
    from metalearn.config import composition

    _check_callbacks(composition.composed(words.settings, with_hydra=True).hydra)
    hydra_main(_shows_only, [*words.flags, *words.settings])


def _check_callbacks(hydra: Any) -> None:
    """Raises: UserError for Hydra's callbacks, which would call anything that a configuration names."""
    if hydra.callbacks:
        raise UserError(
            f"hydra.callbacks.{next(iter(hydra.callbacks))}: callbacks are not supported"
        )


def _shows_only(config: Any) -> None:
    raise AssertionError("Hydra was asked to print, not to run")


def rank() -> int:
    """The number torchrun gave this process; 0 leads, and alone prints and writes."""
    return int(os.environ.get("RANK", "0"))


def _follow(config: Any, folder: Path) -> NoReturn:
    """Compute what the leading process of several needs, write nothing, and exit."""
    from metalearn.run.train import RESULT_FILE, follow

    if not (config.resume == "auto" and (folder / RESULT_FILE).exists()):
        follow(config, folder)
    leave_siblings(0)
    sys.exit(0)


def _check(config: Any) -> None:
    """All that can be known before data are read."""
    from metalearn.config.checking import checked

    settings = checked(
        config
    )  # before torch is imported, so that a mistyped word is answered at once
    from metalearn.run import build

    build.check(settings)


def _check_multirun(overrides: list[str]) -> None:
    """Check each value of each axis once. A mistyped name ends a multirun before it begins; an impossible run only fails itself.

    Raises:
        UserError: for an unknown name, or where none of the runs looked at is possible.
    """
    from metalearn.config import composition

    errors: list[UserError] = []
    runs = composition.one_run_per_value(overrides)
    for run in runs:
        config = composition.composed(run)
        try:
            _check(config)
        except UserError as error:
            errors.append(error)
    if len(errors) == len(runs):
        raise errors[0]


class _Job:
    """The function Hydra calls for each run; picklable, so that launchers can send it to other processes."""

    def __init__(self, multirun: bool) -> None:
        from metalearn.config import plugins

        self.multirun = multirun
        self.plugins = plugins.named()
        self.error: Exception | None = None
        self.__name__ = "metalearn"

    def __call__(self, config: Any) -> float:
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import OmegaConf

        from metalearn.config import composition, plugins
        from metalearn.report.console import open_console
        from metalearn.run import train

        plugins.add(self.plugins)
        settings = HydraConfig.get()
        folder = Path(settings.runtime.output_dir)
        choices: Any = settings.runtime.choices
        name = f"{choices.algo} {choices.dataset}"
        console = open_console()
        recipe = composition.recipe_line(choices)
        overrides = [
            *([f"plugins=[{','.join(self.plugins)}]"] if self.plugins else []),
            *settings.overrides.task,
        ]
        try:
            if self.multirun:
                console.print(
                    f"[bold]{settings.job.num}: {' '.join(overrides)}[/bold]",
                    highlight=False,
                    soft_wrap=True,
                )
                (folder / train.ERROR_FILE).unlink(missing_ok=True)
                train.note_command(folder, name, overrides)
                # Given again with the same hydra.sweep.dir, a multirun skips what is finished and goes on with what is not.
                config = OmegaConf.merge(config, {"resume": "auto"})
            return train.train(config, _relative(folder), name, overrides, console, recipe)
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
    error = told(error)
    line = first_line(error)
    if exit_code(error) is None:
        import traceback

        line = f"{type(error).__name__}: {line}"
        _written(path.with_name("traceback.txt"), traceback.format_exc())
    _written(path, line + "\n")
    return line


def _written(path: Path, text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk must not end the other runs
        path.write_text(text)


def _worst_score(config: Any) -> float:
    from metalearn.config.checking import checked
    from metalearn.run.build import family_of

    try:
        metric = family_of(checked(config)).metric
    except UserError:
        return float("-inf")
    return float("-inf") if metric.higher_is_better else float("inf")


def hydra_main(job: Any, words: list[str]) -> None:
    """Hydra's main for the entry point in `conf/`, its errors as exceptions."""
    import hydra

    from metalearn.config.composition import conf_dir

    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = ["metalearn", *words]
    hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(job)()


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


def leave_siblings(code: int) -> None:
    """Ends one of several processes at once: the threads of torch.distributed now and then outlive the interpreter's
    orderly end, which aborts the process (torch 2.15: "terminate called without an active exception").
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stderr.flush()
        os._exit(code)


def exit_code(error: Exception) -> int | None:
    """2 for a user's mistake, 1 for a run that could not go on, None for a defect of ours."""
    return 2 if isinstance(error, UserError) else 1 if isinstance(error, RunFailed) else None


def told(error: Exception) -> Exception:
    """The error; as a failure of the run where memory, the disk or a file failed, wherever that was."""
    if ran_out(error):
        return RunFailed(
            "out of memory outside of a step; try smaller pictures (dataset.image_size), fewer filters or episodes"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return RunFailed(of_system(error))
    return error
