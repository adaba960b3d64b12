"""Kill and resume runs at random, compare them with uninterrupted ones, write docs/reliability.md.

python scripts/bench_kills.py [kills=100] [seed=0]

Runs of several methods are killed (SIGKILL) at random moments, from process start to end, and
resumed until they finish; then they must equal an uninterrupted run bit for bit. Each process is a
fork of this one, which has the libraries loaded, so that kills hit the run and not the imports.
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import hydra  # noqa: F401
import matplotlib.figure  # noqa: F401
import torch
import torch._dynamo  # imported during a run; load it before the fork
from pages import ROOT, fill, wrap
from same_run import difference, left

import metalearn.run.train  # noqa: F401
from metalearn.cli.main import main as metalearn_main
from metalearn.report.environment import describe_environment

_METHODS = ("maml", "protonet", "reptile", "baseline", "r2d2", "meta_sgd")
_SMALL = (
    "dataset=glyphs", "dataset.num_classes=60", "dataset.image_size=16", "backbone.filters=8",
    "episode.query=3", "train.steps=300", "train.meta_batch=2", "train.log_every=7", "val.every=40",
    "val.episodes=20", "test.episodes=100", "checkpoint.every=10", "train.batch_size=32",
    "logger=none", "engine.threads=1", "resume=auto",
)  # fmt: skip


def train(folder: Path, method: str, seed: int, cache: Path, kill_after: float | None) -> bool:
    """Run the command in a forked process.

    Args:
        folder: Run folder.
        method: Value of `algo`.
        seed: Value of `seed`.
        cache: Cache folder.
        kill_after: Seconds until SIGKILL; None: never.

    Returns:
        True if the process was killed before it ended.

    Raises:
        RuntimeError: The process failed.
    """
    child = os.fork()
    if child == 0:
        with (folder.parent / f"{folder.name}.log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.argv = [
            "metalearn",
            "train",
            f"algo={method}",
            f"seed={seed}",
            *_SMALL,
            f"cache_dir={cache}",
            f"hydra.run.dir={folder}",
        ]
        try:
            metalearn_main()
        except SystemExit as error:
            os._exit(int(error.code or 0))
        os._exit(99)
    end = time.perf_counter() + (kill_after if kill_after is not None else 3600)
    while time.perf_counter() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status):
                raise RuntimeError(
                    f"{method} ended with exit code {os.waitstatus_to_exitcode(status)}; "
                    f"see {folder}.log"
                )
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def main() -> None:
    """Kill and resume runs, write the outcome, and exit with 1 if any run differs."""
    options = dict(arg.partition("=")[::2] for arg in sys.argv[1:])
    num_kills, seed = int(options.get("kills", 100)), int(options.get("seed", 0))
    torch.set_num_threads(1)  # no threads may exist when this process forks
    draw = random.Random(seed)
    kills = dict.fromkeys(_METHODS, 0)
    runs = exact = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        while sum(kills.values()) < num_kills:
            method, number = _METHODS[runs % len(_METHODS)], runs // len(_METHODS)
            reference = folder / f"{method}-{number}-reference"
            resumed = folder / f"{method}-{number}-resumed"
            start = time.perf_counter()
            train(reference, method, number, folder / "cache", None)
            seconds = time.perf_counter() - start
            while train(resumed, method, number, folder / "cache", draw.uniform(0, 0.5 * seconds)):
                kills[method] += 1
            runs += 1
            differs = difference(left(resumed), left(reference))
            exact += differs is None
            message = f"differs in {differs}; " if differs else ""
            message += f"{sum(kills.values())} kills, {exact} of {runs} exact"
            print(f"{method} seed {number}: {message}", flush=True)
    environment = describe_environment("cpu")
    lines = [
        f"{sum(kills.values())} kills at random moments of {runs} runs "
        f"({', '.join(f'{m} {n}' for m, n in kills.items())}): "
        f"{exact} of {runs} runs are bit-for-bit identical to the uninterrupted run (weights, "
        "optimiser state, best checkpoint, metrics, test scores, result).",
        f"`python scripts/bench_kills.py kills={num_kills} seed={seed}`, commit "
        f"{environment['commit']}, {environment['hardware']}, "
        f"torch {environment['versions']['torch']}.",
    ]
    fill(ROOT / "docs/reliability.md", "kills: written by scripts/bench_kills.py", wrap(lines))
    print("\n".join(lines))
    sys.exit(exact != runs)


if __name__ == "__main__":
    main()
