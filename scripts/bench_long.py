"""Measure a long run and a comparison of many runs, and write docs/reliability.md.

python scripts/bench_long.py [steps=10000] [runs=1000]

Measured are resident memory over the steps, the size of metrics.jsonl, and the time that
`metalearn compare` takes over all runs.
"""

import io
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from pages import ROOT, fill, wrap
from rich.console import Console

from metalearn.cli.compare import compare
from metalearn.config import checking, composition
from metalearn.report.environment import describe_environment
from metalearn.report.folder import RunFolder
from metalearn.report.tracker import Tracker
from metalearn.run import loop
from metalearn.run.build import Run, build

_SMALL = [
    "algo=maml", "dataset=glyphs", "dataset.num_classes=60", "dataset.image_size=16",
    "backbone.filters=8", "episode.query=3", "train.meta_batch=2", "train.log_every=50",
    "val.every=500", "val.episodes=10", "test.episodes=20", "logger=none", "engine.threads=1",
]  # fmt: skip


class MemoryTracker(Tracker):
    """Log rows as usual and record the resident memory at each, in MiB."""

    def __init__(self, run: Run, folder: Path) -> None:
        files = RunFolder(folder)
        super().__init__(run.config, run.metric, files, Console(file=io.StringIO()), "long", -1, [])
        self.memory: list[tuple[int, float]] = []

    def log(self, row: dict[str, Any]) -> None:
        """Log a row and record the resident memory."""
        super().log(row)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.memory.append((row["step"], pages * resource.getpagesize() / 2**20))

    def mean(self, first: int, last: int) -> float:
        """Return the mean resident memory over steps `first` + 1 to `last`, in MiB."""
        values = [size for step, size in self.memory if first < step <= last]
        return sum(values) / len(values)


def main() -> None:
    """Train for many steps, compare many runs, and write the measurements."""
    options = dict(arg.partition("=")[::2] for arg in sys.argv[1:])
    steps, count = int(options.get("steps", 10000)), int(options.get("runs", 1000))
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = [*_SMALL, f"cache_dir={folder / 'cache'}"]
        run = build(
            checking.check_config(composition.compose_config([*overrides, f"train.steps={steps}"]))
        )
        tracker = MemoryTracker(run, folder)
        loop.fit(run, tracker, folder)
        first, last = tracker.mean(0, steps // 10), tracker.mean(steps - steps // 10, steps)
        lines.append(
            f"Resident memory of {steps} meta-steps of MAML: {first:.1f} MiB over the first tenth, "
            f"{last:.1f} MiB over the last ({last - first:+.1f} MiB)."
        )
        print(lines[-1], flush=True)

        first_run = folder / "sweep/0"
        command = [
            sys.executable,
            "-m",
            "metalearn",
            "train",
            *overrides,
            "train.steps=500",
            f"hydra.run.dir={first_run}",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        size = (first_run / "metrics.jsonl").stat().st_size / len(
            (first_run / "metrics.jsonl").read_text().splitlines()
        )
        lines.append(
            f"A row of `metrics.jsonl` has {size:.0f} bytes, so {steps} steps with `log_every=50` "
            f"write {size * steps / 50 / 1024:.0f} KiB."
        )
        for number in range(1, count):
            copy = folder / f"sweep/{number}"
            shutil.copytree(first_run, copy, ignore=shutil.ignore_patterns("checkpoints", "*.png"))
            seed, inner_lr = number % 10, 0.1 + 0.01 * (number // 10)  # ten seeds a setting
            settings = OmegaConf.load(copy / "config.yaml")
            settings.seed, settings.algo.inner_lr = seed, inner_lr
            OmegaConf.save(settings, copy / "config.yaml")
            result = json.loads((copy / "result.json").read_text()) | {"seed": seed}
            (copy / "result.json").write_text(json.dumps(result))
        start = time.perf_counter()
        compare([folder / "sweep"], folder / "compared", Console(file=io.StringIO(), width=200))
        lines.append(
            f"`metalearn compare` over {count} runs (ten seeds of each setting): "
            f"{time.perf_counter() - start:.1f} s."
        )
        print(lines[-1], flush=True)
    environment = describe_environment("cpu")
    lines.append(
        f"`python scripts/bench_long.py steps={steps} runs={count}`, commit "
        f"{environment['commit']}, {environment['hardware']}, torch {torch.__version__}."
    )
    fill(ROOT / "docs/reliability.md", "long: written by scripts/bench_long.py", wrap(lines))


if __name__ == "__main__":
    main()
