"""The same seed gives a bit-for-bit identical run."""

import pytest
from rich.console import Console
from same_run import difference, left

from metalearn.run.train import train
from tests.fixtures import SMALL


def check_repeated(cold, warm, other):
    assert difference(left(cold), left(warm)) is None
    assert left(cold)["rows"] != left(other)["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maml", "reptile", "protonet", "rfs"])
def test_repeated_run_is_bitwise_identical_with_a_cold_and_a_warm_cache(name, compose, tmp_path):
    folders = [tmp_path / "cold", tmp_path / "warm", tmp_path / "other"]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        config = compose(
            f"algo={name}",
            "train.steps=6",
            "val.every=3",
            f"cache_dir={tmp_path}/cache",
            f"seed={seed}",
        )
        train(config, folder, name, [], Console(quiet=True))
    check_repeated(*folders)


@pytest.mark.slow
def test_repeated_command_is_bitwise_identical_with_two_threads(metalearn, tmp_path):
    arguments = ["train", "algo=maml", *SMALL, "train.steps=6", "val.every=3", "cache_dir=cache"]
    folders = [tmp_path / "cold", tmp_path / "warm", tmp_path / "other"]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        done = metalearn(
            *arguments, f"hydra.run.dir={folder.name}", f"seed={seed}", OMP_NUM_THREADS="2"
        )
        assert done.returncode == 0, done.stderr
    check_repeated(*folders)
