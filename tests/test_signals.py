"""Runs in processes of their own: signals, readers that leave, another working directory."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from metalearn import checkpoint
from tests.conftest import SMALL


def started(metalearn_words, cwd, cache_dir):
    """The command in a process of its own, once it has logged a step."""
    environment = {**os.environ, "METALEARN_CACHE": str(cache_dir), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    process = subprocess.Popen(
        [sys.executable, "-m", "metalearn", *metalearn_words],
        cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (file := cwd / "x/metrics.jsonl").exists() or not file.stat().st_size:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_leave(number, code, cache_dir, tmp_path):
    words = ["train", "algo=protonet", *SMALL, "train.steps=100000", "train.log_every=10", "hydra.run.dir=x"]
    process = started(words, tmp_path, cache_dir)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert "saved" in errors and "metalearn resume x" in errors and "Traceback" not in errors
    step = checkpoint.load(tmp_path / "x/checkpoints/last.pt", torch.device("cpu"))["step"]
    assert f"stopped at step {step}" in errors


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(cache_dir, tmp_path):
    # One validation that takes minutes: the first signal waits for its end.
    words = [
        "train",
        "algo=maml",
        *SMALL,
        "train.steps=2",
        "train.log_every=1",
        "val.episodes=100000",
        "hydra.run.dir=x",
    ]
    process = started(words, tmp_path, cache_dir)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 143


@pytest.mark.slow
def test_a_reader_that_has_left_costs_nothing(cache_dir, tmp_path):
    words = ["train", "algo=protonet", *SMALL, "train.steps=100000", "train.log_every=10", "hydra.run.dir=x"]
    process = started([*words, "val.every=100"], tmp_path, cache_dir)
    process.stdout.close()
    process.stderr.close()
    rows = tmp_path / "x/metrics.jsonl"
    before = rows.read_text().count("val.")
    while rows.read_text().count("val.") < before + 3:  # each is printed
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert checkpoint.load(tmp_path / "x/checkpoints/last.pt", torch.device("cpu"))["step"] > 0


@pytest.mark.slow
def test_a_run_is_gone_on_with_from_anywhere(metalearn, cache_dir, tmp_path):
    words = [
        "train",
        "algo=protonet",
        *SMALL,
        "train.steps=100000",
        "train.log_every=10",
        "hydra.run.dir=x",
        "cache_dir=own",
    ]
    process = started(words, tmp_path, cache_dir)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    (tmp_path / "elsewhere").mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    again = subprocess.Popen([sys.executable, "-m", "metalearn", "resume", "../x"], cwd=tmp_path / "elsewhere", env=environment, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert any("going on from step" in line for line in again.stdout)
    again.kill()
    again.communicate()
    assert not list((tmp_path / "elsewhere").iterdir())
