"""Random kills with resume, compared bit for bit with runs that were never stopped; the outcome goes into docs/reliability.md.

python scripts/bench_kills.py [kills=100] [seed=0]

Trainings of several methods are killed (SIGKILL) at random moments, from the start of the process to its end, and gone on with
until they finish. Each process is a fork of this one, which has the libraries loaded, so that kills fall into the run and not
into imports.
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
import torch._dynamo  # what a run imports on its way, here once for all
from pages import ROOT, fill
from same_run import difference, left

import metalearn.verbs.train  # noqa: F401
from metalearn import cli, report

_METHODS = ("maml", "protonet", "reptile", "baseline", "r2d2", "meta_sgd")
_SMALL = (
    "dataset=glyphs", "dataset.num_classes=60", "dataset.image_size=16", "backbone.filters=8", "episode.query=3",
    "train.steps=300", "train.meta_batch=2", "train.log_every=7", "val.every=40", "val.episodes=20", "test.episodes=100",
    "checkpoint.every=10", "train.batch_size=32", "logger=none", "engine.threads=1", "resume=auto",
)  # fmt: skip


def train(folder: Path, method: str, seed: int, cache: Path, kill_after: float | None) -> bool:
    """Runs the command in a process of its own. Returns: whether it was killed before its end.

    Raises: RuntimeError where it ended otherwise than well.
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
            cli.main()
        except SystemExit as leaving:
            os._exit(int(leaving.code or 0))
        os._exit(99)
    end = time.perf_counter() + (kill_after if kill_after is not None else 3600)
    while time.perf_counter() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status):
                raise RuntimeError(
                    f"{method} ended with {os.waitstatus_to_exitcode(status)}; see {folder}.log"
                )
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def main() -> None:
    given = dict(word.partition("=")[::2] for word in sys.argv[1:])
    wanted, seed = int(given.get("kills", 100)), int(given.get("seed", 0))
    torch.set_num_threads(1)  # no threads may exist when this process forks
    draw = random.Random(seed)
    kills = dict.fromkeys(_METHODS, 0)
    runs = exact = 0
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        while sum(kills.values()) < wanted:
            method, number = _METHODS[runs % len(_METHODS)], runs // len(_METHODS)
            whole, stopped = (
                place / f"{method}-{number}-whole",
                place / f"{method}-{number}-stopped",
            )
            start = time.perf_counter()
            train(whole, method, number, place / "cache", None)
            seconds = time.perf_counter() - start
            while train(stopped, method, number, place / "cache", draw.uniform(0, 0.5 * seconds)):
                kills[method] += 1
            runs += 1
            differs = difference(left(stopped), left(whole))
            exact += differs is None
            said = f"differs in {differs}; " if differs else ""
            print(
                f"{method} seed {number}: {said}{sum(kills.values())} kills, {exact} of {runs} exact",
                flush=True,
            )
    environment = report.environment("cpu")
    lines = [
        f"{sum(kills.values())} kills at random moments of {runs} runs ({', '.join(f'{m} {n}' for m, n in kills.items())}): "
        f"{exact} of {runs} runs ended bit for bit as the same run never stopped (weights, optimiser state, best checkpoint, "
        "metrics, test scores, result).",
        f"`python scripts/bench_kills.py kills={wanted} seed={seed}`, commit {environment['commit']}, {environment['hardware']}, "
        f"torch {environment['versions']['torch']}.",
    ]
    fill(ROOT / "docs/reliability.md", "kills: written by scripts/bench_kills.py", lines)
    print("\n".join(lines))
    sys.exit(exact != runs)


if __name__ == "__main__":
    main()
