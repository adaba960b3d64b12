"""Meta-train, validate and test a run."""

import sys
from pathlib import Path
from typing import Any

from metalearn.cli import _arguments

HELP = """metalearn train [key=value …] [-m] [--cfg job]

Meta-trains, selects the best checkpoint by validation, tests it once, and writes everything to a
run folder.

  metalearn train algo=maml dataset=omniglot             with the recipe of this pair
  metalearn train algo=protonet dataset=glyphs           built-in data, no download
  metalearn train algo=maml algo.inner_lr=0.1 train.steps=2000 seed=1
  metalearn train -m algo=maml,protonet episode.shot=1,5 seed=0,1     all combinations, one table
  metalearn train -m algo=maml algo.inner_lr=0.1,0.4     a search: only the best on validation is
                                                         tested; all with test.when=always

choices (metalearn list explains them)
  algo=       {algo}
  dataset=    {dataset}
  backbone=   {backbone}
  episode=    {episode}
  optimiser=  {optimiser}
  loss=       {loss}
  augment=    {augment}
  logger=     {logger}
  experiment= {experiment}

settings that are often changed
  budget=smoke|quick|day|paper                    amount of training: seconds; at most 5 minutes; up
                                                  to hours on two cores (the default, and that of
                                                  the tables); the authors', where it is known
  episode.way=5 episode.shot=1 episode.query=15   validation and test, and training unless
  episode.train.way=20                            episode.train.* or the recipe sets its own
  statistics=query|support|support_plus_one|population    normalisation at prediction;
                                                          query is transductive
  train.steps=10000 train.meta_batch=32 train.lr=0.001 train.schedule=cosine train.patience=10
  val.every=500 val.episodes=300 test.episodes=1000
  test_dataset=[glyphs,photos/birds:all]          also tests on other datasets, as evaluate does
  seed=0 episode_seed=1 device=auto|cpu|cuda data_dir=… cache_dir=…
  optimiser=sgd optimiser.momentum=0.9 optimiser.weight_decay=5e-4 augment=crop_flip
  loss=label_smoothing
  hydra.run.dir=my/folder                         the run folder
  resume=auto                                     resume the run in the folder, or show it again

options
  plugins=[package]    use methods and data of this package; for every command. Packages with an
                       entry point need not be named.
  -m, --multirun       every combination of comma-separated values, each in its own folder
  --cfg job            print the composed configuration and stop
  --config-dir DIR     also read configuration files from DIR
  -sc install=bash     shell completion: eval "$(metalearn -sc install=bash)"
  --debug              show the traceback of an error
"""
#: What shell completion offers.
TAKES: tuple[str, ...] = ("{settings}",)


def main(args: list[str]) -> int:
    """Run the command. Return the exit code."""
    from metalearn.cli import _launch
    from metalearn.config import sweeps

    arguments = _arguments.parse(args)
    if arguments.only_prints:
        _launch.print_config(arguments)
        return 0
    keys = {word.partition("=")[0] for word in arguments.overrides}
    if not keys & {"algo", "dataset", "experiment"}:
        _launch.check(arguments)
        return _explain([word for word in arguments.settings if not sweeps.is_sweep(word)])
    folder, is_search = _launch.start(arguments)
    if not arguments.is_multirun:
        return 0
    from metalearn.report.console import open_console

    return 1 if summarise(folder, open_console(), is_search) else 0


def _explain(overrides: list[str]) -> int:
    """Print what a command that chooses nothing would train, and how to begin. Return 2."""
    from metalearn.config import checking, composition

    config = composition.compose_config(overrides, with_hydra=True)
    choices = config.hydra.runtime.choices
    settings = checking.check_config(composition.without_hydra(config))
    print(
        f"Name a method and a dataset. Without them this would train {choices.algo} on "
        f"{choices.dataset}: {settings.train.steps:,} steps of {settings.train.meta_batch} tasks "
        f"(budget={settings.budget}).\n"
        "\n"
        "  metalearn train experiment=demo                 about 2 minutes, built-in data\n"
        f"  metalearn train algo={choices.algo} dataset={choices.dataset}      the full run\n"
        "  metalearn list                                  all methods, datasets and backbones\n"
        "  metalearn train --help                          all settings",
        file=sys.stderr,
    )
    return 2


def summarise(sweep: Path, console: Any, is_search: bool = False) -> int:
    """Print the runs of a multirun and name the failed ones; return the number of these.

    Several runs are then compared; those that differ only in their seed share a row. The table of a
    search has the validation score of each trial; its best one is tested, if it is not, and shown.
    """
    from metalearn.cli.compare import compare
    from metalearn.report.console import print_line, print_lines
    from metalearn.report.folder import RunFolder
    from metalearn.report.tables import result_row, result_table, trial_row
    from metalearn.run.train import resume
    from metalearn.system.reading import read_text

    rows, failures, trials = [], [], []
    # The command could not be saved if the disk was full.
    overrides = {
        files: files.read_command()["overrides"] if files.command.exists() else []
        for files in map(RunFolder, sorted(sweep.iterdir(), key=_job_number))
        if files.path.name.isdigit() or files.command.exists()
    }
    common = set.intersection(*map(set, overrides.values())) if overrides else set()
    for files, words in overrides.items():
        own = " ".join(word for word in words if word not in common)
        name = f"{files.path.name}: {own}" if own else files.path.name
        if files.error.exists():
            failures.append(f"{name} failed: {read_text(files.error).strip()}")
        elif not files.is_trained:
            failures.append(f"{name} has not finished")
        if files.is_trained and is_search:
            result = files.read_result()
            rows.append(trial_row(name, result))
            trials.append((result.validation_score * result.sign, name, files))
        elif files.is_finished:
            rows.append(result_row(name, files.read_result()))
    for column in dict.fromkeys(key for row in rows for key in row if key.startswith("test ")):
        console.print(result_table([row for row in rows if column in row]))
    if len(rows) > 1 and not trials:
        compare([sweep], None, console)
    print_lines(console, failures)
    if trials:
        _, name, best = max(trials, key=lambda trial: trial[0])
        print_line(console, f"best trial on validation: {name}")
        others = [files for *_, files in trials if not files.is_finished and files is not best]
        if others:
            print_line(
                console,
                f"{len(others)} of {len(trials)} trials are not tested; to test one: metalearn "
                f"resume {others[0].path}; all: the same command with test.when=always",
            )
    print_line(console, f"  {sweep}")
    if trials:
        resume(best.path, console)
    return len(failures)


def _job_number(folder: Path) -> tuple[int, str]:
    number = folder.name.partition("-")[0]
    return (int(number) if number.isdigit() else 1 << 30, folder.name)
