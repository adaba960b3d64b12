"""Several processes give what one gives."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from same_run import difference, left

from metalearn.processes import Processes
from metalearn.training import Meter
from tests.conftest import SMALL


def test_shares_are_disjoint_whole_and_even():
    for count in (2, 5, 8, 31):
        for size in (1, 2, 3, 7):
            shares = [Processes(rank, size).share(count) for rank in range(size)]
            assert [task for first, number in shares for task in range(first, first + number)] == list(range(count))
            assert max(number for _, number in shares) - min(number for _, number in shares) <= 1


def test_a_loss_that_is_not_finite_is_found_whoever_computed_it():
    losses = torch.tensor([0.5, 1.0, float("nan"), 2.0, float("inf")])
    own = [losses[first : first + number] for first, number in (Processes(rank, 2).share(5) for rank in (0, 1))]
    whole = sum(Processes(rank, 2).placed(part, 5) for rank, part in enumerate(own))
    meter = Meter(torch.device("cpu"))
    meter.add({}, torch.tensor(False), torch.tensor(7), whole)
    assert meter.skipped() == (1, 7, 2)


@pytest.fixture
def started(cache_dir, tmp_path):
    """Starts metalearn in two processes."""

    def start(*words):
        environment = {**os.environ, "METALEARN_CACHE": str(cache_dir), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "-m",
            "metalearn",
        ]
        return subprocess.Popen(
            [*command, *words], cwd=tmp_path, env=environment, 
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


@pytest.fixture
def torchrun(started):
    def run(*words):
        process = started(*words)
        stdout, stderr = process.communicate(timeout=180)
        return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maml", "protonet"])
def test_two_processes_give_the_result_of_one_with_the_same_meta_batch(name, metalearn, torchrun, tmp_path):
    # 5 tasks and 7 episodes: the shares are uneven. SGD, because Adam makes a full step of a gradient that is mere rounding.
    words = ["train", f"algo={name}", *SMALL, "train.meta_batch=5", "train.steps=4", "val.every=2", "test.episodes=7"]
    words += ["train.optimiser=sgd", "train.lr=0.1"]
    one, two = metalearn(*words, "hydra.run.dir=one"), torchrun(*words, "hydra.run.dir=two")
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("test accuracy") == 1  # one process prints
    results = [json.loads((tmp_path / folder / "result.json").read_text()) for folder in ("one", "two")]
    assert [result["processes"] for result in results] == [1, 2]
    assert results[0]["test"]["accuracy"]["mean"] == pytest.approx(results[1]["test"]["accuracy"]["mean"], abs=0.02)
    assert (tmp_path / "one/test_scores.csv").read_text().count("\n") == 8
    assert (tmp_path / "two/test_scores.csv").read_text().count("\n") == 8
    states = [torch.load(tmp_path / folder / "checkpoints/last.pt", weights_only=True) for folder in ("one", "two")]
    for part in ("meta", "fixed"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=1e-4, atol=1e-5)
    rows = [[json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").open()] for folder in ("one", "two")]
    for first, second in zip(*rows, strict=True):
        assert first["train.loss"] == pytest.approx(second["train.loss"], rel=1e-4)
        assert first["val.accuracy"] == pytest.approx(second["val.accuracy"], abs=0.05)


@pytest.mark.slow
def test_mistakes_are_told_once(torchrun):
    done = torchrun("train", *SMALL, "train.meta_batch=1", "hydra.run.dir=few")
    assert done.returncode != 0
    assert done.stderr.count("metalearn: train.meta_batch=1: 2 processes want one each at least") == 1
    done = torchrun("train", "-m", *SMALL, "seed=0,1")
    assert done.stderr.count("start torchrun without it") == 1


def children(process):
    """The processes that one has started."""
    return map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_two_processes_go_on_as_if_never_stopped(number, started, torchrun, tmp_path):
    words = ["train", "algo=maml", *SMALL, "train.meta_batch=3", "train.steps=40", "train.log_every=4", "val.every=8"]
    words += ["val.episodes=400", "checkpoint.every=6"]
    assert torchrun(*words, "hydra.run.dir=whole").returncode == 0
    words += ["hydra.run.dir=stopped", "resume=auto"]
    process, rows = started(*words), tmp_path / "stopped/metrics.jsonl"
    while not rows.exists() or rows.read_text().count("\n") < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    for one in (*children(process.pid), process.pid) if number == signal.SIGKILL else (process.pid,):
        os.kill(one, number)
    _, errors = process.communicate(timeout=60)
    assert not (tmp_path / "stopped/result.json").exists(), "it was finished before it was stopped"
    if number == signal.SIGTERM:
        assert errors.count("saved") == 1 and "metalearn: stopped at step" in errors
    again = torchrun(*words)
    assert again.returncode == 0, again.stderr
    assert "going on from step" in again.stdout
    assert difference(left(tmp_path / "stopped"), left(tmp_path / "whole")) is None
