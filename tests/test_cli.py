"""Commands run in a separate process, as a user runs them, errors included."""

import argparse
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from metalearn.cli import _launch
from tests.fixtures import SMALL

pytestmark = pytest.mark.slow


def error_line(done, code: int) -> str:
    assert done.returncode == code, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stdout
    return lines[0]


def is_empty(tmp_path) -> bool:
    return not [path for path in tmp_path.rglob("*") if path.name != "data"]


def test_run_writes_all_output_files(metalearn, tmp_path):
    done = metalearn(
        "train",
        "algo=maml",
        *SMALL,
        "train.steps=6",
        "val.every=3",
        "train.log_every=2",
        "hydra.run.dir=my run",
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "my run"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert {"train.loss", "train.accuracy", "tasks_per_second"} <= rows[0].keys()
    assert [row["step"] for row in rows if "val.accuracy" in row] == [3, 6]
    result = json.loads((folder / "result.json").read_text())
    scores = [
        float(line.split(",")[1])
        for line in (folder / "test_scores.csv").read_text().splitlines()[1:]
    ]
    assert result["test"]["accuracy"]["episodes"] == len(scores) == 6
    assert result["test"]["accuracy"]["mean"] == pytest.approx(sum(scores) / 6, abs=1e-5)
    assert result["test"]["accuracy"]["ci95"] > 0
    assert {"protocol", "protocol_id", "environment", "seconds", "best_step"} <= result.keys()
    assert result["environment"]["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    for name in ("best.pt", "last.pt"):
        content = torch.load(folder / "checkpoints" / name, weights_only=True)
        assert {"step", "meta", "fixed", "spec", "standardisation"} <= content.keys()
    assert content["step"] == 6
    assert "steps: 6" in (folder / "config.yaml").read_text()
    assert result["protocol_id"] in done.stdout
    assert f"{100 * result['test']['accuracy']['mean']:.2f}%" in done.stdout

    # Tested again, the result is the same; other statistics give a different protocol.
    evaluated = metalearn("evaluate", "run=my run")
    assert evaluated.returncode == 0, evaluated.stderr
    stored = json.loads((folder / "evaluations" / f"{result['protocol_id']}.json").read_text())
    assert stored["test"] == result["test"]
    other = metalearn("evaluate", "run=my run", "statistics=support", "episode.query=5")
    assert other.returncode == 0, other.stderr
    assert (
        len(list((folder / "evaluations").glob("*.json"))) == 4
    )  # both statistics of two protocols
    assert "episode.quer" in error_line(metalearn("evaluate", "run=my run", "episode.quer=5"), 2)
    assert "train with statistics=population" in error_line(
        metalearn("evaluate", "run=my run", "statistics=population"), 2
    )
    split = error_line(metalearn("evaluate", "run=my run", "dataset.split_seed=5"), 2)
    assert "were trained or validated on" in split
    assert "holds a finished run; resume=auto" in error_line(
        metalearn("train", *SMALL, "hydra.run.dir=my run"), 2
    )
    assert metalearn("evaluate", "run=my run", "algo.test_inner_steps=9").returncode == 0
    steps = folder / f"evaluations/{result['protocol_id']}-test_inner_steps=9.json"
    assert json.loads(steps.read_text())["overrides"] == ["algo.test_inner_steps=9"]
    assert "cannot change how the run was trained" in error_line(
        metalearn("evaluate", "run=my run", "backbone.filters=9"), 2
    )
    again = metalearn("evaluate", "my run", "split=train")  # the folder alone
    assert again.returncode == 0 and "train accuracy" in again.stdout
    compared = metalearn("compare", "my run")
    assert compared.returncode == 0, compared.stderr
    assert (folder / "comparison.md").exists()
    assert result["protocol_id"] in compared.stdout


def test_zero_steps_test_the_initialisation(metalearn, tmp_path):
    done = metalearn("train", "algo=protonet", *SMALL, "train.steps=0", "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/result.json").read_text())["best_step"] == 0


def test_regression_reports_the_squared_error(metalearn, tmp_path):
    arguments = [
        "train",
        "algo=maml",
        "dataset=sinusoid",
        "train.steps=3",
        "val.episodes=4",
        "test.episodes=6",
        "logger=none",
    ]
    done = metalearn(*arguments, "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/result.json").read_text())["test"]["mse"]["episodes"] == 6


def test_a_test_that_diverges_leaves_a_trained_run(metalearn, tmp_path):
    words = ["algo=maml", "dataset=sinusoid", "train.steps=2", "val.every=2", "val.episodes=2"]
    words += ["logger=none", "algo.step_lrs=[]", "test.episodes=1000", "hydra.run.dir=run"]
    line = error_line(metalearn("train", *words), 1)
    assert "of 1000 test episodes are not finite, the first of episode " in line
    assert "the run is trained: metalearn evaluate run can change how it adapts" in line
    assert not (tmp_path / "run/result.json").exists()
    done = metalearn("evaluate", "run=run", "algo.test_inner_steps=1")
    assert done.returncode == 0, done.stderr
    assert "test mse" in done.stdout


def test_wandb_without_a_key_is_offline_and_never_prompts(metalearn, tmp_path):
    overrides = [override for override in SMALL if override != "logger=none"]
    done = metalearn(
        "train",
        "algo=protonet",
        *overrides,
        "hydra.run.dir=out",
        WANDB_MODE=None,
        WANDB_API_KEY=None,
        HOME=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert sum("W&B" in line for line in done.stdout.splitlines()) == 1
    (log,) = (tmp_path / "out/wandb").glob("offline-run-*/*.wandb")
    files = log.parent / "files"
    (path,) = files.glob("media/table/episode*.table.json")
    table = json.loads(path.read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["part"] for row in rows].count("support") == 5 and len(rows) == 5 * (1 + 3)
    queries = [row for row in rows if row["part"] == "query"]
    right = sum(row["class"] == row["predicted"] for row in queries) / len(queries)
    first_score = (tmp_path / "out/test_scores.csv").read_text().splitlines()[1]
    assert right == pytest.approx(float(first_score.split(",")[1]), abs=1e-5)
    assert all(row["predicted"] == "" for row in rows if row["part"] == "support")
    staged = (tmp_path / ".local/share/wandb/artifacts/staging").glob("tmp*")  # for wandb sync
    images = [Image.open(file) for file in staged if file.read_bytes()[1:4] == b"PNG"]
    assert len(images) == 20 and {image.size for image in images} == {(16, 16)}
    # Dark ink on light paper.
    assert all(np.asarray(image.convert("L")).mean() > 128 for image in images)
    assert list(files.glob("media/table/result*")) and list(files.glob("media/images/learning*"))


def test_multirun_names_the_failed_run_and_finishes_the_others(metalearn, tmp_path):
    done = metalearn(
        "train",
        "-m",
        *SMALL,
        "algo=protonet",
        "episode.way=5,500",
        "seed=0,1",
        "hydra.sweep.dir=sweep",
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert sorted(path.parent.name for path in tmp_path.glob("sweep/*/result.json")) == ["0", "1"]
    assert sorted(path.parent.name for path in tmp_path.glob("sweep/*/error.txt")) == ["2", "3"]
    lines = done.stdout.splitlines()
    table = lines[next(at for at, line in enumerate(lines) if line.startswith(" run ")) :]
    assert any("failed" in line and "episode.way=500" in line for line in table)
    assert any("episode.way=5" in line and "%" in line for line in table)
    # The seeds together, with an interval over them.
    assert any("seeds ±" in line for line in table)
    assert "seeds ±" in (tmp_path / "sweep/comparison.md").read_text()
    assert len((tmp_path / "sweep/comparison.csv").read_text().splitlines()) == 1 + 2


def test_sweeper_receives_the_validation_score(metalearn, tmp_path):
    pytest.importorskip(
        "hydra_plugins.hydra_optuna_sweeper", reason="the sweep extra is not installed"
    )
    done = metalearn(
        "train", "-m", *SMALL, "algo=maml", "hydra/sweeper=optuna",
        "hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1",
        "algo.inner_lr=interval(0.05,1)", "hydra.sweep.dir=sweep",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    best = (tmp_path / "sweep/optimization_results.yaml").read_text()
    scores = [
        json.loads(path.read_text())["val"]["accuracy"]["mean"]
        for name in ("result", "validation")  # only the best trial is tested
        for path in tmp_path.glob(f"sweep/*/{name}.json")
    ]
    assert len(scores) == 2
    assert f"best_value: {max(scores)}" in best


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], ["trian", "did you mean train"]),
        (["train", "algo=mamll"], ["did you mean maml"]),
        (["train", "algo.inner_lrr=1"], ["did you mean algo.inner_lr"]),
        (["train", "maml"], ["key=value"]),
        (["train", "--algo"], ["--algo", "no such option"]),
        (["train", "train.steps=x"], ["a whole number"]),
        (["train", *SMALL, "episode.way=500"], ["way=500"]),
        (["train", *SMALL, "episode.query=30"], ["20 examples"]),
        (["train", "algo=protonet", "dataset=sinusoid"], ["regression"]),
        (["train", "dataset=folder"], ["no folder or zip"]),
        (
            ["train", *SMALL, "hydra.run.dir=/proc/nowhere/x"],
            ["/proc/nowhere/x", "cannot be written"],
        ),
        (["train", "algo=maml,protonet"], ["add -m"]),
        (["train", "--cfg", "xyz"], ["--cfg xyz", "job"]),
        (["train", "train.source=batches"], ["MAML trains on episodes"]),
        (["train", "-m", "algo=maml,mamll"], ["did you mean maml"]),
        (["train", "-m", "train.steps=-1,-2"], ["at least 0"]),
        (["train", "-m", "seed=0,1", "hydra/launcher=jobllib"], ["did you mean joblib"]),
        (["evaluate", "run=nowhere"], ["nowhere"]),
        (["evaluate", "nowhere"], ["nowhere: no run there"]),
        (["evaluate"], ["run=<folder>"]),
        (["evaluate", "run=nowhere", "corupt=noise"], ["did you mean corrupt"]),
        (["plot", "nowhere", "kind=worst"], ["did you mean kinds"]),
        (["train", "algo=maml", "logger=[csv,tensorbord]"], ["did you mean tensorboard"]),
        (["list", "all"], ["no arguments"]),
    ],
    ids=lambda value: " ".join(value)[-40:],
)  # fmt: skip
def test_mistake_gives_one_line_and_no_files(arguments, expected, metalearn, tmp_path):
    line = error_line(metalearn(*arguments), 2)
    assert all(part in line for part in expected), line
    assert is_empty(tmp_path)


def test_missing_data_without_network_is_one_line(metalearn, tmp_path):
    line = error_line(
        metalearn(
            "train", "algo=maml", "dataset.url=http://127.0.0.1:9", "logger=none", timeout=30
        ),
        2,
    )
    assert all(
        part in line
        for part in ["http://127.0.0.1:9", str(tmp_path / "data/omniglot"), "dataset=glyphs"]
    ), line
    assert is_empty(tmp_path)


def test_debug_shows_the_traceback(metalearn):
    done = metalearn("train", "algo=mamll", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_help_list_config_and_completion_print(metalearn, tmp_path):
    assert "train" in metalearn("--help").stdout
    assert "episode.train.way" in metalearn("train", "--help").stdout
    listed = metalearn("list").stdout
    for text in ("maml", "protonet", "omniglot", "conv4", "Finn et al. 2017", "logger="):
        assert text in listed
    config = metalearn("train", "algo=anil", "--cfg", "job")
    assert config.returncode == 0, config.stderr
    assert "adapted_part: head" in config.stdout
    assert "hydra:" not in config.stdout
    assert is_empty(tmp_path)


@pytest.mark.parametrize("more", [[], ["seed=3", "train.steps=10"], ["-m", "seed=0,1"]])
def test_train_without_a_choice_starts_nothing(metalearn, tmp_path, more):
    done = metalearn("train", *more)
    assert (done.returncode, done.stdout) == (2, "")
    steps = "10 steps" if "train.steps=10" in more else "30,000 steps"
    assert f"this would train maml on omniglot: {steps} of 8 tasks" in done.stderr
    assert "metalearn train experiment=demo" in done.stderr
    assert is_empty(tmp_path)


def test_python_3_14_checks_the_help_of_hydras_parser(monkeypatch, capsys):
    def check(self, action):
        raise ValueError("badly formed help string")

    monkeypatch.setattr(argparse.ArgumentParser, "_check_help", check, raising=False)
    _launch.hydra_main(lambda config: None, ["--cfg", "job"])
    assert "algo:" in capsys.readouterr().out


def test_closed_pipe_is_no_error(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "metalearn", "list"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    "arguments", [["-sc"], ["-sc", "install=basch"], ["train", "-sc", "seed=1"]]
)
def test_wrong_completion_option_is_one_line(metalearn, arguments):
    done = metalearn(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("metalearn: -sc") and done.stderr.count("\n") == 1
