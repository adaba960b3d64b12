"""Several processes give the result of one."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from same_run import difference, left

from metalearn.run.step import Meter
from metalearn.system.processes import Processes
from tests.fixtures import SMALL


def test_shares_are_disjoint_complete_and_even():
    for count in (2, 5, 8, 31):
        for size in (1, 2, 3, 7):
            shares = [Processes(rank, size).share(count) for rank in range(size)]
            assert [
                task for first, number in shares for task in range(first, first + number)
            ] == list(range(count))
            assert max(number for _, number in shares) - min(number for _, number in shares) <= 1


def test_nonfinite_loss_of_any_process_is_detected():
    losses = torch.tensor([0.5, 1.0, float("nan"), 2.0, float("inf")])
    parts = [
        losses[first : first + number]
        for first, number in (Processes(rank, 2).share(5) for rank in (0, 1))
    ]
    gathered = torch.stack(
        [Processes(rank, 2).scatter(part, 5) for rank, part in enumerate(parts)]
    ).sum(0)
    meter = Meter(torch.device("cpu"))
    meter.add({}, torch.tensor(False), torch.tensor(7), gathered)
    assert meter.skipped() == (1, 7, 2)


def end(processes):
    """Wait for all processes and return the leading one, the only one that prints."""
    for one in processes:
        one.wait()
    assert not processes[1].stdout
    return processes[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_two_processes_equal_one_and_resume_like_an_uninterrupted_run(
    number, metalearn, ranks, tmp_path
):
    # 5 tasks and 7 episodes give uneven shares. SGD, because Adam turns a gradient that is mere
    # rounding error into a full step.
    arguments = [
        "train",
        "algo=maml",
        *SMALL,
        "train.meta_batch=5",
        "train.steps=40",
        "val.every=8",
        "test.episodes=7",
    ]
    arguments += [
        "train.optimiser=sgd",
        "train.lr=0.1",
        "train.log_every=4",
        "checkpoint.every=6",
        "val.episodes=60",
    ]
    command = end(ranks(*arguments, "hydra.run.dir=two"))
    assert command.returncode == 0, command.stderr
    assert command.stdout.count("test accuracy") == 1
    if number == signal.SIGTERM:
        assert metalearn(*arguments, "hydra.run.dir=one").returncode == 0
        results = [
            json.loads((tmp_path / folder / "result.json").read_text()) for folder in ("one", "two")
        ]
        assert [result["processes"] for result in results] == [1, 2]
        accuracies = [result["test"]["accuracy"]["mean"] for result in results]
        assert accuracies[0] == pytest.approx(accuracies[1], abs=0.02)
        for folder in ("one", "two"):
            assert (tmp_path / folder / "test_scores.csv").read_text().count("\n") == 8
        states = [
            torch.load(tmp_path / name / "checkpoints/last.pt", weights_only=True)
            for name in ("one", "two")
        ]
        for part in ("meta", "fixed"):
            torch.testing.assert_close(states[0][part], states[1][part], rtol=1e-3, atol=1e-4)
        rows = [
            [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
            for name in ("one", "two")
        ]
        for first, second in zip(*rows, strict=True):
            assert first["train.loss"] == pytest.approx(second["train.loss"], rel=1e-3)
    arguments += ["hydra.run.dir=stopped", "resume=auto"]
    processes, log = ranks(*arguments), tmp_path / "stopped/metrics.jsonl"
    processes[0].wait_until(lambda: log.exists() and log.read_text().count("\n") >= 2)
    for one in processes:
        one.send(number)
    for one in processes:
        one.process.join(60)
    assert not (tmp_path / "stopped/result.json").exists(), "the run finished before the signal"
    if number == signal.SIGTERM:
        assert (
            processes[0].stderr.count("saved") == 1
            and "metalearn: stopped at step" in processes[0].stderr
        )
    resumed = end(ranks(*arguments))
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from step" in resumed.stdout
    assert difference(left(tmp_path / "stopped"), left(tmp_path / "two")) is None


@pytest.mark.slow
def test_sweep_in_several_processes_is_refused(ranks):
    assert (
        end(ranks("train", "-m", *SMALL, "seed=0,1")).stderr.count("start it without torchrun") == 1
    )


@pytest.mark.slow
def test_torchrun_reports_a_mistake_once(cache_dir, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "metalearn",
    ]
    environment = {
        **os.environ,
        "METALEARN_CACHE": str(cache_dir),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }
    arguments = ["train", *SMALL, "train.meta_batch=1", "hydra.run.dir=few"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode != 0
    line = "metalearn: train.meta_batch=1: should be at least 2, the number of processes"
    assert done.stderr.count(line) == 1
