"""Start runs under Hydra: compose, check before any data are read, run."""

import argparse
import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict

from metalearn.cli._arguments import Arguments
from metalearn.cli._search import sampling, trial_folder, worst_score
from metalearn.cli.main import exit_siblings, rank
from metalearn.config import composition, paths, plugins, sweeps
from metalearn.config.checking import check_config
from metalearn.config.components import conf_dir
from metalearn.config.schema import RunConfig
from metalearn.report.console import open_console, print_line
from metalearn.system.atomic import write_text
from metalearn.system.errors import (
    RunFailed,
    UserError,
    as_failure,
    exit_code,
    first_line,
    writing,
)

# torch is imported only for runs that are possible, so that a mistyped word is answered fast.


def check(arguments: Arguments) -> None:
    """Check all that can be known before data are read; raise UserError for the first mistake."""
    if arguments.is_multirun:
        _check_multirun(arguments.settings)
    else:
        _check(composition.compose_config(arguments.settings))


def start(arguments: Arguments) -> tuple[Path, bool]:
    """Train what the arguments describe.

    Return the folder of the run or multirun, and whether it is a search: a multirun whose trials
    are compared on validation.
    """
    job = _Job(arguments.is_multirun)
    folder = (_start_multirun if arguments.is_multirun else _start_run)(arguments, job)
    if job.error is not None:
        raise job.error
    return folder, job.is_search


def _start_run(arguments: Arguments, job: "_Job") -> Path:
    """Compose once, check, and run under Hydra. Return the run folder."""
    from hydra._internal.callbacks import Callbacks
    from hydra.core.utils import run_job
    from hydra.types import HydraContext, RunMode

    config = composition.compose_config(arguments.settings, with_hydra=True)
    hydra = config.hydra
    _check_hydra(hydra)
    if hydra.mode == RunMode.MULTIRUN:
        raise UserError("hydra.mode=MULTIRUN: start a multirun with -m")
    own = composition.without_hydra(config)
    settings = _check(own)
    folder = Path(hydra.run.dir)
    if rank() > 0:
        from metalearn.run.parts import data_folder
        from metalearn.run.train import follow

        paths.make_absolute(own, arguments.settings, data_folder(settings))
        follow(own, folder)
        exit_siblings(0)
        sys.exit(0)
    with open_dict(config):
        hydra.mode = RunMode.RUN
        hydra.run.dir = str(folder)  # resolved once, because its name contains the time
    context = HydraContext(None, Callbacks())  # type: ignore[arg-type]  # only launchers need more
    with _folder(folder):
        run_job(job, config, "hydra.run.dir", None, context)  # type: ignore[arg-type]
    return folder


def _start_multirun(arguments: Arguments, job: "_Job") -> Path:
    """Check each value of each axis, then let Hydra's sweeper run. Return the multirun folder."""
    _check_multirun(arguments.settings)
    if "RANK" in os.environ:
        raise UserError("--multirun: a sweep uses one process; start it without torchrun")
    single = [word for word in arguments.settings if not sweeps.is_sweep(word)]
    config = composition.compose_config(single, with_hydra=True)
    hydra, when = config.hydra, config.test.when
    _check_hydra(hydra)
    is_sampled = not _is_basic(hydra.sweeper)
    job.axes = [sweeps.key_of(word) for word in arguments.settings if sweeps.is_sweep(word)]
    job.is_search = when == "best" or is_sampled or sweeps.is_grid_search(job.axes)
    job.is_tested = when == "always" or not job.is_search
    folder = Path(hydra.sweep.dir)
    with _folder(folder):
        more = [f"hydra.sweep.dir={composition.quoted(str(folder))}"]
        if is_sampled:
            more += sampling(config, arguments.settings)
        elif _is_basic(hydra.launcher) and hydra.sweeper.max_batch_size is None:
            # Hydra's sweeper composes a whole batch before its first run: minutes for 1,000 runs.
            more.append("hydra.sweeper.max_batch_size=1")
        if not job.is_tested:
            print("search: only the best trial on validation is tested (all: test.when=always)")
        try:
            hydra_main(job, [*arguments.options, *arguments.settings, *more])
        except Exception as error:  # runs save theirs: this is one of Slurm, Ray, a database, …
            used = [
                f"hydra/{part}={hydra.runtime.choices[f'hydra/{part}']}"
                for part in ("launcher", "sweeper")
                if not _is_basic(hydra[part])
            ]
            if isinstance(error, UserError) or not used:
                raise
            raise RunFailed(f"{', '.join(used)}: {first_line(error)}") from error
    return folder


def _is_basic(plugin: Any) -> bool:
    """Return True for Hydra's own sweeper or launcher."""
    return bool(plugin._target_.rpartition(".")[2].startswith("Basic"))


def print_config(arguments: Arguments) -> None:
    """Let Hydra print a configuration."""
    config = composition.compose_config(arguments.settings, with_hydra=True)
    _check_hydra(config.hydra)
    options = list(arguments.options)
    if "job" in options and "--resolve" not in options:
        check_config(composition.without_hydra(config))  # its errors are one line
        options.append("--resolve")
    hydra_main(lambda config: None, [*options, *arguments.settings])


def _check_hydra(hydra: Any) -> None:
    """Raise UserError for settings with which Hydra would call anything a configuration names."""
    if hydra.callbacks:
        name = next(iter(hydra.callbacks))
        raise UserError(f"hydra.callbacks.{name}: callbacks are not supported")
    for part in ("launcher", "sweeper"):
        target = str(OmegaConf.select(hydra, f"{part}._target_", default=""))
        if not target.startswith(("hydra._internal.", "hydra_plugins.")):
            raise UserError(
                f"hydra.{part}: should be one of Hydra's plugins, chosen by hydra/{part}=<name>"
            )


def _check(config: Any) -> RunConfig:
    settings = check_config(config)
    from metalearn.run import pairings

    pairings.check(settings)
    return settings


def _check_multirun(overrides: list[str]) -> None:
    """Check each value of each axis once.

    A mistyped name ends a multirun before it starts; an impossible run only fails itself, unless
    none of the checked runs is possible.
    """
    errors: list[UserError | None] = []
    for config in sweeps.one_config_per_value(overrides):
        try:
            _check(config)
            errors.append(None)
        except UserError as error:
            errors.append(error)
    if all(errors):
        raise next(filter(None, errors))


class _Job:
    """The function that Hydra calls for each run; picklable, so that launchers can send it."""

    def __init__(self, is_multirun: bool) -> None:
        self.is_multirun = is_multirun
        self.axes: list[str] = []  # the settings that a multirun varies
        self.is_search, self.is_tested = False, True  # whether each run is tested
        self.plugins = plugins.named()
        self.error: Exception | None = None
        self.__name__ = "metalearn"

    def __call__(self, config: Any) -> float:
        """Train one run. Return its validation score for sweepers."""
        from metalearn.report.folder import RunFolder
        from metalearn.run.parts import data_folder
        from metalearn.run.resuming import save_command
        from metalearn.run.train import train

        plugins.add(self.plugins)
        settings = HydraConfig.get()
        files = RunFolder(Path(settings.runtime.output_dir))
        choices: Any = settings.runtime.choices
        name = f"{choices.algo} {choices.dataset}"
        console = open_console()
        recipe = f"budget={config.budget}, {composition.recipe_line(choices)}"
        named = [f"plugins=[{','.join(self.plugins)}]"] if self.plugins else []
        overrides = [*named, *settings.overrides.task]
        own = [word for word in overrides if sweeps.key_of(word) in self.axes] or overrides
        title = f"{settings.job.num}: {' '.join(own)}" if self.is_multirun else ""
        try:
            paths.make_absolute(config, overrides, data_folder(config))
            if self.is_search:
                files = trial_folder(files, overrides, config)
            if self.is_multirun:
                files.error.unlink(missing_ok=True)
                save_command(files, name, overrides)
                # Repeated with the same hydra.sweep.dir, a multirun skips what is finished.
                config = OmegaConf.merge(config, {"resume": "auto"})
            folder, here = files.path, Path.cwd()
            folder = folder.relative_to(here) if folder.is_relative_to(here) else folder
            return train(config, folder, name, overrides, console, recipe, title, self.is_tested)
        except Exception as error:
            # Hydra prints lines of its own about a failing job, so the error of a single run is
            # raised later. In a multirun, a failed run must not end the others: the table names
            # it, and the sweeper gets the worst score.
            if self.is_multirun:
                print_line(console, f"{settings.job.num}: failed: {_save_error(error, files)}")
            else:
                self.error = error
            return worst_score(config)


def _save_error(error: Exception, files: Any) -> str:
    """Save why a run of a multirun failed, with a traceback for a bug. Return the line."""
    error = as_failure(error)
    line = first_line(error)
    with contextlib.suppress(OSError):  # a full disk must not end the other runs
        if exit_code(error) is None:
            line = f"{type(error).__name__}: {line}"
            write_text(files.traceback, traceback.format_exc())
        write_text(files.error, line + "\n")
    return line


def hydra_main(job: Any, words: list[str]) -> None:
    """Call Hydra's main for the entry point in `conf/`; its errors are exceptions."""
    import hydra

    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = ["metalearn", *words]
    if hasattr(argparse.ArgumentParser, "_check_help"):
        # Python 3.14 fails on the help of Hydra's parser (hydra issue 3121); it is never shown.
        argparse.ArgumentParser._check_help = lambda self, action: None
    hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(job)()


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Make a folder; afterwards remove those of its new parents that are still empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with writing(f"output folder {folder}", "; choose another hydra.run.dir"):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
