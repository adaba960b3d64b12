"""Compare the training speed of the current code with that of another commit, run in turn on this machine.

python scripts/same_speed.py base=<commit> [pairs=5] [only=maml]

Each case is trained for some seconds with the code of both trees, A B A B …, with one thread; the median of the tasks a second over
the rows of a run counts, and the ratio here/base of each pair. Nothing is recorded.
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
    "dataset=glyphs", "dataset.num_classes=200", "train.log_every=2", "val.every=1000", "val.episodes=2", "test.episodes=2",
    "logger=none", "engine.threads=1", "device=cpu", "train.steps=24",
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
    """Return the median of the tasks a second of a run, its first rows left out."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["tasks_per_second"] for row in rows[3:])


def main() -> None:
    given = dict(word.partition("=")[::2] for word in sys.argv[1:])
    if "base" not in given:
        sys.exit(__doc__)
    cases = {name: words for name, words in _CASES.items() if given.get("only", "") in name}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        subprocess.run(
            ["git", "-C", ROOT, "worktree", "add", "--detach", "-q", place / "tree", given["base"]],
            check=True,
        )
        try:
            for pair in range(int(given.get("pairs", "5"))):
                for side, tree in (("base", place / "tree"), ("here", ROOT)):
                    folder = place / f"{side}{pair}"
                    if start(tree, folder, cases).wait():
                        sys.exit(f"{side} failed:\n{(folder / 'log.txt').read_text()[-3000:]}")
                for case, speeds in found.items():
                    speeds.append(
                        (speed(place / f"base{pair}" / case), speed(place / f"here{pair}" / case))
                    )
        finally:
            subprocess.run(
                ["git", "-C", ROOT, "worktree", "remove", "--force", place / "tree"], check=True
            )
    print(
        f"{'case':<20} {'base':>8} {'here':>8} tasks/s   here/base of each pair: median (least to most)"
    )
    for case, speeds in found.items():
        base, here = (statistics.median(column) for column in zip(*speeds, strict=True))
        ratios = [new / old for old, new in speeds]
        print(
            f"{case:<20} {base:8.1f} {here:8.1f}           {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
