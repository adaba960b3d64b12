"""Runs in separate processes: signals, closed pipes, a different working directory."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from metalearn.run import checkpoint
from tests.fixtures import SMALL

pytestmark = pytest.mark.slow
_LONG = [
    "train",
    "algo=protonet",
    *SMALL,
    "train.steps=100000",
    "train.log_every=10",
    "hydra.run.dir=x",
]


def has_logged(folder):
    rows = folder / "x/metrics.jsonl"
    return lambda: rows.exists() and rows.stat().st_size > 0


def last_step(folder):
    return checkpoint.load(folder / "x/checkpoints/last.pt", torch.device("cpu"))["step"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_and_exits_and_the_run_resumes_from_any_folder(number, code, start, tmp_path):
    process = start(*_LONG, "cache_dir=own")
    process.wait_until(has_logged(tmp_path))
    process.send(number)
    process.wait(30)
    assert process.returncode == code
    assert (
        "saved" in process.stderr
        and "metalearn resume x" in process.stderr
        and "Traceback" not in process.stderr
    )
    assert f"stopped at step {last_step(tmp_path)}" in process.stderr
    (tmp_path / "elsewhere").mkdir()
    resumed = start("resume", "../x", cwd=tmp_path / "elsewhere", METALEARN_CACHE=None)
    resumed.wait_until(lambda: "resuming from step" in resumed.stdout)
    resumed.send(signal.SIGKILL)
    resumed.wait()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_signal_stops_a_validation_within_a_second(start, tmp_path):
    long = ["train.steps=2", "train.log_every=1", "val.episodes=100000"]
    process = start("train", "algo=maml", *SMALL, *long, "hydra.run.dir=x")
    process.wait_until(has_logged(tmp_path))
    time.sleep(1)  # the first step is logged; after the second one the validation starts
    process.send(signal.SIGINT)
    assert process.wait(3).returncode == 130  # a second, and the exit of the interpreter
    assert "stopped in the validation of step 2, saved" in process.stderr
    checkpoint = torch.load(tmp_path / "x/checkpoints/last.pt", weights_only=True)
    assert (checkpoint["step"], checkpoint["row"]["step"]) == (2, 2)


def test_second_signal_exits_at_once(start, tmp_path):
    # A step of minutes, because the first signal takes effect after it.
    long = ["train.meta_batch=100000", "engine.strategy=loop", "train.steps=1"]
    process = start("train", "algo=maml", *SMALL, *long, "hydra.run.dir=x")
    process.wait_until((tmp_path / "x/config.yaml").exists)
    time.sleep(1)
    process.send(signal.SIGTERM)
    time.sleep(1)
    assert process.is_running
    assert "SIGTERM: saving after this step" in process.stderr
    process.send(signal.SIGTERM)
    assert process.wait(5).returncode == 143


def test_closed_output_does_not_stop_the_run(cache_dir, tmp_path):
    environment = {
        **os.environ,
        "METALEARN_CACHE": str(cache_dir),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "metalearn", *_LONG, "val.every=100"],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not has_logged(tmp_path)():
        assert process.poll() is None
        time.sleep(0.1)
    for stream in (process.stdout, process.stderr):
        assert stream is not None
        stream.close()
    rows = tmp_path / "x/metrics.jsonl"
    before = rows.read_text().count("val.")
    while rows.read_text().count("val.") < before + 3:  # each validation is printed
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert last_step(tmp_path) > 0
