"""Compare uniform, hierarchical and hard training episodes on Omniglot, by the paired test.

python scripts/benchmark_samplers.py data=<folder> [key=value …]

ProtoNet is trained once with each `episode.train.sampler`, on 30 alphabets, and tested on uniform
and on hierarchical episodes of 15 others. Further words are settings of every run. Writes
benchmarks/samplers.md, which contains the table of `metalearn compare`.
"""

import subprocess
import sys
from pathlib import Path

from runs import run

from metalearn.report.environment import describe_environment

_OUT = Path(__file__).parent.parent / "benchmarks" / "samplers.md"
_RUNS = Path("outputs/benchmark/samplers")
_SAMPLERS = ("uniform", "hierarchical", "hard")
_SETTINGS = [
    "algo=protonet", "dataset=omniglot", "dataset.split=alphabet", "dataset.rotations=none",
    "backbone.filters=16", "episode=20w1s", "episode.query=5", "episode.train.way=20",
    "episode.train.query=5", "train.meta_batch=4",
    "train.steps=200", "train.log_every=50", "val.every=100", "val.episodes=100",
    "test.episodes=600", "engine.threads=1",
]  # fmt: skip


def main() -> None:
    """Run what is not finished, and write the page."""
    data, *more = [word.removeprefix("data=") for word in sys.argv[1:]]
    settings = [*_SETTINGS, f"data_dir={Path(data).absolute()}", *more]
    folders = []
    for sampler in _SAMPLERS:
        folder = _RUNS / sampler
        run(folder, [*settings, f"episode.train.sampler={sampler}"], [])
        command = [sys.executable, "-m", "metalearn", "evaluate", f"run={folder}"]
        subprocess.run([*command, "episode.sampler=hierarchical"], check=True)
        folders.append(str(folder))
    compare = [sys.executable, "-m", "metalearn", "compare", *folders, f"out={_RUNS}/compare"]
    subprocess.run(compare, check=True)
    table = (_RUNS / "compare" / "comparison.md").read_text()
    environment = describe_environment("cpu")
    _OUT.write_text(
        "# How the classes of training episodes are chosen\n\n"
        "ProtoNet (16 filters) on Omniglot, 30 training and 15 test alphabets, 20-way 1-shot,\n"
        "200 steps of 4 tasks, one seed; tested on uniform and on hierarchical episodes.\n\n"
        f"{table}\n"
        f"`python scripts/benchmark_samplers.py data=<folder>{''.join(f' {one}' for one in more)}`,"
        f"\ncommit {environment['commit']}, {environment['hardware']}.\n"
    )


if __name__ == "__main__":
    main()
