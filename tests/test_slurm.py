"""A sweep on Slurm, with scripts in place of Slurm's commands."""

import os
import re
import signal
import time

import pytest

from tests.fixtures import SMALL

#: Each job is a process on this machine, whose number srun saves.
_COMMANDS = {
    "sbatch": 'cp "$1" {0}/batch; bash {0}/batch > /dev/null 2>&1 & echo Submitted batch job 7',
    "srun": 'echo $$ > {0}/new; mv {0}/new {0}/pid; shift 5; exec "$@" >> {0}/log 2>&1',
    "sacct": "printf 'JobID|State|NodeList\\n7|RUNNING|node\\n'",
    "scontrol": 'echo "$@" > {0}/control; (sleep 1; bash {0}/batch) > /dev/null 2>&1 &',
}


@pytest.mark.slow
def test_job_at_its_time_limit_is_requeued_and_resumes(start, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra sweep")
    for name, line in _COMMANDS.items():
        script = tmp_path / name
        script.write_text(f"#!/bin/bash\n{line.format(tmp_path)}\n")
        script.chmod(0o755)
    sweep = start(
        "train", "-m", *SMALL, "algo=protonet", "seed=3", "train.steps=60", "train.meta_batch=2",
        "checkpoint.every=5", "hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu",
        "hydra.launcher.gpus_per_node=1", "hydra.launcher.timeout_min=10",
        "hydra.launcher.max_num_timeout=1", "hydra.sweep.dir=sweep",
        PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="7",
    )  # fmt: skip
    last, deadline = tmp_path / "sweep/0/checkpoints/last.pt", time.monotonic() + 120
    sweep.wait_until(lambda: last.exists() or time.monotonic() > deadline)
    # What Slurm does hydra.launcher.signal_delay_s before the limit.
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGUSR2)
    assert sweep.wait().returncode == 0, sweep.stderr

    batch = (tmp_path / "batch").read_text()
    for line in ("--partition=gpu", "--gpus-per-node=1", "--time=10", "--signal=USR2@120"):
        assert f"#SBATCH {line}\n" in batch
    assert (tmp_path / "control").read_text() == "requeue 7\n"
    step = re.search(r"resuming from step (\d+) ", (tmp_path / "log").read_text())
    assert step and 0 < int(step[1]) < 60
    assert (tmp_path / "sweep/0/result.json").exists()


def test_a_launcher_that_fails_gives_one_line(metalearn, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra sweep")
    words = ["train", "-m", *SMALL, "algo=protonet", "seed=0,1", "hydra/launcher=submitit_slurm"]
    done = metalearn(*words, PATH=str(tmp_path))
    assert done.returncode == 1
    line = 'metalearn: hydra/launcher=submitit_slurm: Could not detect "srun"'
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1
