"""Compare the training speed of the current code with a different commit on this machine.

python scripts/same_speed.py base=<commit> [pairs=5] [only=maml]

Trains each case for some seconds with each tree in turn, on one thread. Prints the median tasks per
second of the runs and the ratio here/base of each pair. Writes nothing.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from pages import ROOT
from same_results import start

_COMMON = (
    "dataset=glyphs", "dataset.num_classes=200", "train.log_every=2", "val.every=1000",
    "val.episodes=2", "test.episodes=2", "logger=none", "engine.threads=1", "device=cpu",
    "train.steps=24",
)  # fmt: skip
_STRIDE = ("backbone.downsample=stride", "backbone.output=mean")
_CASES: dict[str, tuple[str, ...]] = {
    "maml 1 query": (
        "algo=maml",
        "episode.train.query=1",
        "train.meta_batch=32",
        *_STRIDE,
        *_COMMON,
    ),
    "maml 15 queries": (
        "algo=maml",
        "episode.train.query=15",
        "train.meta_batch=16",
        *_STRIDE,
        *_COMMON,
    ),
    "fomaml 5 steps": (
        "algo=fomaml",
        "algo.inner_steps=5",
        "train.meta_batch=8",
        *_STRIDE,
        *_COMMON,
    ),
    "reptile": ("algo=reptile", "train.meta_batch=5", *_STRIDE, *_COMMON),
    "protonet": ("algo=protonet", "train.meta_batch=1", *_COMMON),
    "rfs batches": ("algo=rfs", "train.batch_size=64", "train.meta_batch=1", *_COMMON),
}


def speed(run: Path) -> float:
    """Return the median tasks per second of a run, without its first 3 rows (warm-up)."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["tasks_per_second"] for row in rows[3:])


def main() -> None:
    """Run the cases with both trees and print the speeds."""
    options = dict(arg.partition("=")[::2] for arg in sys.argv[1:])
    if "base" not in options:
        sys.exit(__doc__)
    cases = {name: case for name, case in _CASES.items() if options.get("only", "") in name}
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run(
            [*git, "add", "--detach", "-q", folder / "tree", options["base"]], check=True
        )
        try:
            for pair in range(int(options.get("pairs", "5"))):
                runs = {side: folder / f"{side}{pair}" for side in ("base", "here")}
                for side, tree in (("base", folder / "tree"), ("here", ROOT)):
                    if start(tree, runs[side], cases).wait():
                        sys.exit(f"{side} failed:\n{(runs[side] / 'log.txt').read_text()[-3000:]}")
                for case, pairs in speeds.items():
                    pairs.append((speed(runs["base"] / case), speed(runs["here"] / case)))
        finally:
            subprocess.run([*git, "remove", "--force", folder / "tree"], check=True)
    ratio = "here/base of each pair: median (smallest to largest)"
    print(f"{'case':<20} {'base':>8} {'here':>8} tasks/s   {ratio}")
    for case, pairs in speeds.items():
        base, here = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = [new / old for old, new in pairs]
        ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"{case:<20} {base:8.1f} {here:8.1f}           {ratio}")


if __name__ == "__main__":
    main()
