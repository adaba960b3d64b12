"""Several processes give what one gives."""

import json
import os
import subprocess
import sys

import pytest
import torch

from metalearn.processes import Processes
from tests.conftest import SMALL


def test_shares_are_disjoint_whole_and_even():
    for count in (2, 5, 8, 31):
        for size in (1, 2, 3, 7):
            shares = [Processes(rank, size).share(count) for rank in range(size)]
            assert [task for first, number in shares for task in range(first, first + number)] == list(range(count))
            assert max(number for _, number in shares) - min(number for _, number in shares) <= 1


@pytest.fixture
def torchrun(cache_dir, tmp_path):
    def run(*words):
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
        return subprocess.run(
            [*command, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180
        )

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
