"""The same seed gives the same run, bit for bit."""

import json

import pytest
import torch
from rich.console import Console

from metalearn.verbs.train import train
from tests.conftest import ALGORITHMS, SMALL

_TIMINGS = {"tasks_per_second", "seconds"}


def story(folder):
    """All that a run says, timings aside."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    return (
        [{key: value for key, value in row.items() if key not in _TIMINGS} for row in rows],
        {key: result[key] for key in ("test", "val", "best_step", "details", "protocol_id")},
        (folder / "test_scores.csv").read_bytes(),
        (folder / "test_classes.csv").read_bytes(),
    )


def same(first, second):
    """Whether two trees of tensors and plain data are equal bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def check_repeated(cold, warm, other):
    stories = [story(folder) for folder in (cold, warm, other)]
    assert stories[0] == stories[1]
    assert stories[0][0] != stories[2][0]
    for name in ("best.pt", "last.pt"):
        first, second = (torch.load(folder / "checkpoints" / name, weights_only=True) for folder in (cold, warm))
        assert same(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_repeated_run_is_bitwise_identical_with_a_cold_and_a_warm_cache(name, compose, tmp_path):
    folders = [tmp_path / "cold", tmp_path / "warm", tmp_path / "other"]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        config = compose(f"algo={name}", "train.steps=6", "val.every=3", f"cache_dir={tmp_path}/cache", f"seed={seed}")
        train(config, folder, name, [], Console(quiet=True))
    check_repeated(*folders)


@pytest.mark.slow
def test_so_is_the_command_with_two_threads(metalearn, tmp_path):
    words = ["train", "algo=maml", *SMALL, "train.steps=6", "val.every=3", "cache_dir=cache"]
    folders = [tmp_path / "cold", tmp_path / "warm", tmp_path / "other"]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        done = metalearn(*words, f"hydra.run.dir={folder.name}", f"seed={seed}", OMP_NUM_THREADS="2")
        assert done.returncode == 0, done.stderr
    check_repeated(*folders)
