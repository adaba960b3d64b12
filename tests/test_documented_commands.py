"""Every command of README, docs/ and the helps is valid, and runs or is named with the reason."""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys

import docs_hooks
import pytest

from metalearn.cli import _arguments, _launch, main
from metalearn.config import choices, composition
from metalearn.system.errors import UserError
from tests.command import start as start_command
from tests.documented import ROOT, commands, words_of, write_data, write_workspace

_COMMANDS = commands()
_LONG = "takes too long"
#: Commands that no test runs as they are, by their beginning, with the reason.
_NOT_RUN = {
    "make ": "starts what other tests run, or takes too long; CI runs setup, demo, docs, check",
    "python scripts/bench": _LONG,
    "python scripts/time_to_accuracy.py": _LONG,
    "python scripts/same_": "compares commits of a checkout",
    "python scripts/settings_index.py": "writes into the repository; CI runs it",
    "metalearn serve": "serves until it is stopped; tests/test_serve.py starts it",
    "metalearn reproduce": _LONG,
    "metalearn predict support=examples.csv query='photos/*.jpg'": "the name is that of texts here",
    "metalearn data clinc150": "its data are not in the repository",
    "metalearn evaluate run0 run1 dataset=caltech101:all": "its data are not in the repository",
}
#: The package on these pages is installed, and all their commands run, by tests/test_extending.py.
_PLUGIN_PAGES = ("docs/extending.md", "docs/add-dataset.md")


def reason_not_run(command):
    reasons = [reason for start, reason in _NOT_RUN.items() if command.startswith(start)]
    if _COMMANDS[command] in _PLUGIN_PAGES:
        reasons.append("tests/test_extending.py runs it")
    return next(iter(reasons), None)


@functools.cache
def targets():
    return re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M)


@functools.cache
def stored(dataset):
    return composition.compose_config(["algo=maml", f"dataset={dataset}"])


def check_settings(name, words):
    """Check that a command takes these key=value words; settings are those of some run."""
    takes = main._command(name).TAKES
    own = {*_arguments.keys(takes), "at"}
    settings = [word for word in words if "=" in word and word.partition("=")[0] not in own]
    assert not settings or "{settings}" in takes, settings
    dataset = words[0] if name == "data" else "omniglot"
    group = [word for word in settings if word.partition("=")[0] == "dataset"]
    assert all(name in choices.options("dataset") for word in group for name in [
        one.partition(":")[0] for one in word.partition("=")[2].split(",")
    ] if not name.endswith(".zip"))  # fmt: skip
    composition.apply_overrides(stored(dataset), [word for word in settings if word not in group])


@pytest.mark.parametrize(
    "command", [one for one in _COMMANDS if _COMMANDS[one] not in _PLUGIN_PAGES]
)
def test_is_valid(command):
    program, *words = words_of(command)
    if program == "make":
        assert words[0] in targets()
    elif program == "python":
        assert words[0] == "-c" or (ROOT / words[0]).is_file()
    else:
        name, *words = words[words.index("metalearn") + 1 :] if program == "torchrun" else words
        if name == "train":
            _launch.check(_arguments.parse(words))
        else:
            assert name in main.commands()
            check_settings(name, [word for word in words if not word.startswith("--")])


@pytest.mark.slow
@pytest.mark.parametrize("name", choices.options("dataset"))
def test_commands_on_the_page_of_a_dataset_are_valid(name):
    page = docs_hooks._dataset(name)
    data, train = page.partition("```\n")[2].partition("\n```")[0].splitlines()
    check_settings("data", shlex.split(data)[2:])
    _launch.check(_arguments.parse(shlex.split(train)[2:]))


def test_every_page_is_read():
    assert {"README.md", "CONTRIBUTING.md", "docs/start.md"} <= set(_COMMANDS.values())


def test_no_reason_is_left_over():
    for start in _NOT_RUN:
        assert any(command.startswith(start) for command in _COMMANDS), start


def test_a_wrong_key_or_name_is_found():
    for words in (["algo=maml", "train.stepz=3"], ["algo=mamml"], ["-m", "algo=maml,mamml"]):
        with pytest.raises(UserError):
            _launch.check(_arguments.parse(words))
    for name, words in (("evaluate", ["episode.shott=1"]), ("plot", ["algo.inner_stepz=1"])):
        with pytest.raises(UserError):
            check_settings(name, words)
    with pytest.raises(AssertionError):
        check_settings("export", ["test.episodes=3"])


#: Settings that end a run soon; they replace those of the command.
_SMALL = {
    "train.steps": 2, "train.meta_batch": 2, "val.every": 1, "val.episodes": 2, "test.episodes": 2,
    "logger": "none", "engine.threads": 1, "device": "cpu",
}  # fmt: skip


def two_runs(words):
    """Return a sweep with two values of its first axis, and one of the others."""
    kept, count = [], 2
    for word in words:
        key, is_setting, value = word.partition("=")
        if is_setting and "," in value and not set("[({") & set(value):
            word, count = f"{key}={','.join(value.split(',')[:count])}", 1
        kept.append(word)
    return kept


def small(words):
    """Return the words of a training with a small budget."""
    if "experiment=demo" in words:
        words = [*words, "dataset.num_classes=60"]
    if "hydra/sweeper=optuna" in words:
        words = [*words, "hydra.sweeper.n_trials=2"]
    if any("joblib" in word for word in words):
        words = [*words, "hydra.launcher.n_jobs=1"]
    if "-m" in words:
        words = two_runs(words)
    added = dict(_SMALL)
    if any(word.startswith("engine.choices=") for word in words):
        del added["engine.threads"]  # the file sets it
    kept = [word for word in words if word.partition("=")[0] not in _SMALL]
    given = {word.partition("=")[0]: word for word in kept}
    return [*given.values(), *(f"{key}={value}" for key, value in added.items())]


_CIFAR = ["dataset=cifar_fs", "train.batch_size=8"]
#: Runs and classifiers that commands name, by folder.
_RUNS = {
    "outputs/maml-omniglot/T": ["algo=maml"],
    "run0": ["algo=protonet", "checkpoint.keep=2"],
    "run1": ["algo=protonet", "seed=1"],
    "run2": ["algo=protonet", "seed=2"],
    "outputs/simclr": ["algo=simclr"],
    "outputs/classifier": ["algo=simple_shot", *_CIFAR],
    "outputs/maps": ["algo=frn", *_CIFAR, "train.source=batches", "backbone.halvings=3"],
    "outputs/maml-navigation/T": ["algo=maml", "dataset=navigation"],
}
#: Their copies, by folder.
_COPIES = {
    "outputs/protonet-omniglot/T": "run0",
    "outputs/kept": "run0",
    "outputs/demo": "outputs/maml-omniglot/T",
    "runs/maml": "outputs/maml-omniglot/T",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a function that runs a command in a copy of a folder with all that commands name."""
    cache, output, data, files = map(tmp_path_factory.mktemp, ("cache", "output", "data", "files"))
    folders = {"METALEARN_CACHE": str(cache), "METALEARN_DATA": str(data)}

    def start(words, cwd):
        if words[0] == "metalearn":
            ended = start_command(tuple(words[1:]), cwd, output, {**folders}).wait(600)
            return ended.returncode, ended.stdout + ended.stderr
        environment = {**os.environ, **folders, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        program = [sys.executable, *words[words[0] == "python" :]]
        done = subprocess.run(program, cwd=cwd, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def prepare(*words):
        code, text = start(["metalearn", *words], files)
        assert code == 0, text

    write_data(data)
    write_workspace(files)
    for folder, words in _RUNS.items():
        has_dataset = any(word.startswith("dataset=") for word in words)
        net = [] if has_dataset else ["dataset=omniglot", "backbone.filters=8"]
        prepare("train", *small([*words, *net]), f"hydra.run.dir={folder}")
    for copy, folder in _COPIES.items():
        shutil.copytree(files / folder, files / copy)
    swept = ["algo.inner_lr=0.1,0.4", "train.lr=0.001,0.01", "hydra.sweep.dir=sweep"]
    prepare("train", "-m", *small(["algo=maml", "dataset=glyphs", *swept]))
    prepare("predict", "support=cells", "query=new", "out=labels")

    def run_in(words, cwd):
        shutil.copytree(files, cwd, dirs_exist_ok=True)
        (cwd / "data").symlink_to(data)
        for word in words:
            key, _, value = word.partition("=")
            if key in ("out", "hydra.run.dir") and (cwd / value).is_dir():
                shutil.rmtree(cwd / value)
        return start(words, cwd)

    return run_in


def started(command):
    """Return the words that a test starts for a command, with a small budget."""
    words = words_of(command)
    if words[0] == "torchrun":
        words = ["-m", "torch.distributed.run", *words[1:]]
    if "train" in words:
        place = words.index("train") + 1
        words = [*words[:place], *small(words[place:])]
    elif words[:2] in (["metalearn", "evaluate"], ["metalearn", "plot"]) and "sweep" not in words:
        words = [word for word in words if not word.startswith("test.episodes=")]
        words += ["test.episodes=2", "engine.threads=1", "device=cpu"]
    return words


def different():
    """Return the first of the commands that start the same, in any folder and order of words."""
    first: dict[frozenset[str], str] = {}
    for command in sorted(_COMMANDS):
        if reason_not_run(command) is None:
            words = (_COPIES.get(word, word) for word in started(command))
            kept = (word for word in words if not word.startswith(("hydra.run.dir=", "out=")))
            first.setdefault(frozenset(kept), command)
    return first.values()


@pytest.mark.slow
@pytest.mark.parametrize("command", different())
def test_runs(command, run, tmp_path):
    words = started(command)
    code, text = run(words, tmp_path)
    assert code == 0, f"{words}\n{text}"
