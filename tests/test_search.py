"""A search compares trials on validation and tests only the best one."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from metalearn.cli import _search, compare, train
from metalearn.config import choices, composition, sweeps
from metalearn.report.comparison import Comparison
from metalearn.report.folder import RunFolder
from metalearn.report.measurements import Measurement, dataset_name
from metalearn.report.result import Result
from metalearn.report.tables import result_table
from metalearn.run.evaluate import evaluate
from metalearn.run.resuming import save_command
from metalearn.run.train import resume
from metalearn.system.errors import UserError
from metalearn.tasks.types import Estimate
from tests.fixtures import SMALL

_GRID = ["train", "-m", *SMALL, "algo=maml", "hydra.sweep.dir=sweep"]
_OPTUNA = [
    *_GRID, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1",
    "algo.inner_lr=interval(0.05,1)",
]  # fmt: skip


def outcomes(sweep: Path) -> dict[str, tuple[str, float, bool]]:
    """Return for each trial its inner learning rate, its validation score and if it is tested."""
    found = {}
    for path in sorted(path for path in sweep.iterdir() if path.is_dir()):
        files = RunFolder(path)
        (rate,) = (word for word in files.read_command()["overrides"] if "inner_lr" in word)
        result = files.read_result()
        assert files.is_trained and files.validation.exists() != files.result.exists()
        assert files.curve.exists()
        found[path.name] = (rate, result.validation_score, result.split == "test")
    return found


@pytest.mark.slow
def test_optuna_search_is_resumed_and_tests_only_the_best_trial(metalearn, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra sweep")
    sweep = tmp_path / "sweep"
    done = metalearn(*_OPTUNA)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "study" not in done.stderr  # Optuna's own lines
    first = outcomes(sweep)
    best = max(first, key=lambda name: first[name][1])
    assert {name for name, (*_, is_tested) in first.items() if is_tested} == {best}
    assert f"best trial on validation: {best}: {first[best][0]}\n" in done.stdout
    assert "2 of 3 trials are not tested; to test one: metalearn resume sweep/" in done.stdout
    best_value = (sweep / "optimization_results.yaml").read_text().split("best_value: ")[1]
    assert float(best_value) == first[best][1]  # the highest, without hydra.sweeper.direction
    scores = (sweep / best / "test_scores.csv").read_text()

    # As if stopped in the best trial. The sampler proposes the same trials again, and a test in
    # one go is that of a trial that was tested later.
    shutil.rmtree(sweep / best)
    again = metalearn(*_OPTUNA, "test.when=always")
    assert again.returncode == 0, again.stdout + again.stderr
    assert outcomes(sweep) == {name: (*facts[:2], True) for name, facts in first.items()}
    assert again.stdout.count("step      2/2") == 1  # nothing else is trained again
    assert (sweep / best / "test_scores.csv").read_text() == scores


@pytest.mark.slow
def test_grid_search_continues_with_more_values_and_names_a_failed_trial(
    metalearn, tmp_path, capsys
):
    sweep, console = tmp_path / "sweep", Console(width=100, record=True)
    assert metalearn(*_GRID, "algo.inner_lr=0.1,0.4").returncode == 0
    first = outcomes(sweep)
    (untested,) = (sweep / name for name, (*_, is_tested) in first.items() if not is_tested)
    evaluate(untested, ["test.episodes=3"], "test", None, console)  # on request
    compare.main([str(sweep)])
    assert f"left out: {untested}, not tested; " in capsys.readouterr().out.replace("\n", " ")

    # More values: a trial keeps its folder under another number.
    more = metalearn(*_GRID, "algo.inner_lr=0.2,0.1,0.4,-1")
    assert more.returncode == 1
    assert "3: algo.inner_lr=-1 failed: algo.inner_lr=-1" in more.stdout
    assert more.stdout.count("step      2/2") == 1 and more.stdout.count(": finished, ") == 2
    shutil.rmtree(sweep / "3")
    scores = {rate: score for rate, score, _ in outcomes(sweep).values()}
    assert scores.keys() == {f"algo.inner_lr={rate}" for rate in (0.1, 0.2, 0.4)}
    assert all(scores[rate] == score for rate, score, _ in first.values())
    resume(untested, console)
    assert (untested / "result.json").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["algo.inner_lr=0.1,0.4"], True),
        (["algo.inner_lr=0.1,0.4", "train.lr=range(1,3)", "seed=0"], True),
        (["algo.inner_lr=0.1,0.4", "seed=0,1"], False),
        (["algo=maml,protonet"], False),
        (["episode.shot=1,5"], False),
        (["algo.inner_lr=0.1"], False),
    ],
)
def test_grid_over_settings_of_the_method_is_a_search(words, expected):
    axes = [sweeps.key_of(word) for word in words if sweeps.is_sweep(word)]
    assert sweeps.is_grid_search(axes) is expected


def test_trial_uses_the_folder_of_the_same_settings(compose, tmp_path):
    config = compose("algo=maml")
    for name, rate in (("0", 0.1), ("1", 0.2)):
        (tmp_path / name).mkdir()
        words = [f"algo.inner_lr={rate}", "seed=0", "logger=wandb"]
        save_command(RunFolder(tmp_path / name), "maml glyphs", words)

    def folder(number, *words):
        path = tmp_path / number
        path.mkdir(exist_ok=True)  # as Hydra does
        return _search.trial_folder(RunFolder(path), list(words), config).path.name

    same = ("seed=0", "algo.inner_lr=0.2", "logger=none", "test.when=always", "cache_dir=/x")
    assert folder("1", *same) == folder("0", *same) == folder("7", *same) == "1"
    assert not (tmp_path / "7").exists()
    assert folder("0", "algo.inner_lr=0.3", "seed=0") == "0-b"
    assert folder("0", "algo.inner_lr=0.2", "seed=1") == "0-b"
    assert folder("2", "algo.inner_lr=0.3", "seed=0") == "2"


def test_sampler_gets_the_direction_of_the_metric_and_a_seed():
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra sweep")

    def more(*others):
        words = ["hydra/sweeper=optuna", *others]
        return _search.sampling(composition.compose_config(words, with_hydra=True), words)

    seed = "hydra.sweeper.sampler.seed=0"
    assert more() == ["hydra.sweeper.direction=maximize", seed]
    assert more("dataset=sinusoid") == ["hydra.sweeper.direction=minimize", seed]
    assert more("hydra.sweeper.direction=minimize", "hydra.sweeper.sampler.seed=3") == []
    # A study that is continued must propose other trials.
    assert more("hydra.sweeper.storage=sqlite:///a.db") == ["hydra.sweeper.direction=maximize"]


def test_best_trial_of_regression_has_the_lowest_error(tmp_path, monkeypatch):
    for name, score in (("0", 2.0), ("1", 0.5), ("10", 1.0)):
        files = RunFolder(tmp_path / name)
        files.path.mkdir()
        save_command(files, "maml sinusoid", [f"algo.inner_lr={name}"])
        result = measurement(metric="mse", split="val").result
        result.training = {
            "val": {"mse": {"mean": score, "ci95": 0.1, "episodes": 4}},
            "best_step": 1,
        }
        result.write(files.validation)
    shown: list[Path] = []
    monkeypatch.setattr("metalearn.run.train.resume", lambda folder, console: shown.append(folder))
    console = Console(width=100, record=True)
    assert train.summarise(tmp_path, console, is_search=True) == 0
    assert shown == [tmp_path / "1"]
    text = console.export_text()
    assert "best trial on validation: 1: algo.inner_lr=1\n" in text and "val mse" in text
    assert text.index("0: ") < text.index("1: ") < text.index("10: ")


def test_missing_sweeper_names_what_to_install(monkeypatch):
    with pytest.raises(UserError, match="hydra/sweeper=ax: is not installed; install the plugin"):
        composition.compose_config(["hydra/sweeper=ax"])
    line = choices.no_such_choice("hydra/sweeper", "optuna")
    assert line == "hydra/sweeper=optuna: is not installed; install metalearn-lab[sweep]"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["hydra.swep.dir=x"], "hydra.sweep.dir"),
        (["hydra/launchr=basic"], "hydra/launcher"),
        (["hydra/launcher=slurm"], "submitit_slurm"),
        (["hydra/sweeper=optuna", "hydra.sweeper.n_trails=3"], "hydra.sweeper.n_trials"),
        (["hydra/sweeper=optuna", "hydra.sweeper.sampler.sed=3"], "hydra.sweeper.sampler.seed"),
        (["hydra/sweeper=optuna", "hydra/sweeper/sampler=rnadom"], "random"),
    ],
)
def test_mistyped_settings_of_hydra_get_a_hint(words, hint):
    if "hydra/sweeper=optuna" in words:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra sweep")
    with pytest.raises(UserError, match=rf"did you mean {hint}\?"):
        composition.compose_config(words)


def measurement(
    name="protonet glyphs", rate=0.1, data="glyphs", split="test", way=5, metric="accuracy",
    **protocol,
) -> Measurement:  # fmt: skip
    """Return a measurement without files."""
    settings = {"_target_": f"metalearn.data.x.{data.title()}", **protocol}
    shape = {"way": way, "shot": 1, "query": 15, "statistics": "query", "data": str(settings)}
    result = Result(
        metric=metric, higher_is_better=metric == "accuracy", test=Estimate(0.5, 0.1, 20),
        details={}, protocol=shape, protocol_id=f"{data}{split}{way}{protocol}", name=name, seed=0,
        environment={"hardware": "a computer"}, seconds=60.0, split=split,
    )  # fmt: skip
    scores = torch.rand(20, generator=torch.Generator().manual_seed(int(100 * rate)))
    own = {"algo.inner_lr": rate}
    return Measurement(Path(name), name, own, result, "", settings, 1.0, "a computer", scores)


def widths(rows) -> int:
    console = Console(width=300, record=True)
    console.print(result_table(rows, list(rows[0]).index("method") + 1))
    return max(len(line.rstrip()) for line in console.export_text().splitlines())


def test_methods_that_share_protocols_are_rows_and_protocols_are_sorted_columns():
    both = [
        measurement(rate=rate, data=data, split=split, way=way)
        for rate in (0.1, 0.2)
        for data, split, way in (
            ("glyphs", "train", 5), ("omniglot", "test", 5), ("glyphs", "test", 20),
            ("glyphs", "test", 5),
        )
    ]  # fmt: skip
    comparison = Comparison(both)
    rows = comparison.rows(160, "\n")
    assert [row["method"] for row in rows] == [
        f"protonet glyphs algo.inner_lr={rate}" for rate in (0.1, 0.2)
    ]
    assert [heading.split("\n")[:2] for heading in list(rows[0])[3:]] == [
        ["glyphs", "5w 1s 15q"],
        ["glyphs", "20w 1s 15q"],
        ["glyphs", "train classes"],
        ["omniglot", "5w 1s 15q"],
    ]
    # Too narrow for four columns: one row for each method and protocol, in the same order.
    rows = comparison.rows(90, "\n")
    assert len(rows) == 8 and list(rows[0])[:3] == ["test", "method", "accuracy"]
    assert [row["test"].split(", ")[0] for row in rows] == ["glyphs"] * 6 + ["omniglot"] * 2


def test_table_of_columns_is_used_exactly_if_it_fits():
    comparison = Comparison([measurement(rate=rate, way=way) for rate in (1, 2) for way in (5, 9)])
    least = next(width for width in range(20, 200) if "test" not in comparison.rows(width, "\n")[0])
    for row in (rows := comparison.rows(least, "\n")):
        row["method"] = "x" * 24
    assert widths(rows) == least - 1  # a table ends with a space


def test_methods_that_share_no_protocol_have_one_row_each():
    rows = Comparison(
        [
            measurement(data="glyphs"),
            measurement("maml omniglot", data="omniglot"),
            measurement("maml glyphs", way=20),
        ]
    ).rows(160, ", ")
    assert [(row["test"].split(", ")[:2], row["method"]) for row in rows] == [
        (["glyphs", "5w 1s 15q"], "protonet glyphs"),
        (["glyphs", "20w 1s 15q"], "maml glyphs"),
        (["omniglot", "5w 1s 15q"], "maml omniglot"),
    ]


def test_heading_has_the_settings_that_distinguish_data_of_the_same_name():
    comparison = Comparison([measurement(size=28, jitter=1), measurement(size=64, jitter=1)])
    first, second = map(comparison.heading, comparison.protocols)
    assert ", size=28, " in first and ", size=64, " in second and "jitter=" not in first + second


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"_target_": "metalearn.data.glyphs.Glyphs"}, "glyphs"),
        ({"_target_": "metalearn.data.folder.Folder", "name": "folder", "path": "a/letters/"},
         "folder letters"),
        ({"_target_": "metalearn.data.folder.Folder", "name": "cifar_fs", "path": "cifar100"},
         "cifar_fs"),
        ({}, ""),
    ],
)  # fmt: skip
def test_dataset_is_named_in_words(settings, name):
    assert dataset_name(settings) == name


def test_comparison_file_has_dataset_and_split(tmp_path):
    other = dataclasses.replace(measurement("maml glyphs"), dataset={"name": "emoji"})
    lines = [measurement(split="all"), other]
    compare._write(lines, tmp_path, Console(width=100, record=True))
    rows = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    assert [(row["dataset"], row["split"]) for row in rows] == [
        ("glyphs", "all"),
        ("emoji", "test"),
    ]
    assert json.loads(rows[0]["way"]) == 5
