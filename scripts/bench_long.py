"""Long runs: memory over 10,000 steps, the size of what is written, and a comparison of a thousand runs; into docs/reliability.md.

python scripts/bench_long.py [steps=10000] [runs=1000]
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
from pages import ROOT, fill
from rich.console import Console

from metalearn import composition, config, loop, report
from metalearn.build import Run, build
from metalearn.tracking import Tracker
from metalearn.verbs.compare import compare

_SMALL = [
    "algo=maml", "dataset=glyphs", "dataset.num_classes=60", "dataset.image_size=16", "backbone.filters=8", "episode.query=3",
    "train.meta_batch=2", "train.log_every=50", "val.every=500", "val.episodes=10", "test.episodes=20", "logger=none", "engine.threads=1",
]  # fmt: skip


class Memory(Tracker):
    """Keeps rows as any run does, and notes resident memory at each, in MiB."""

    def __init__(self, run: Run, folder: Path) -> None:
        super().__init__(run.config, run.metric, folder, Console(file=io.StringIO()), "long", -1)
        self.at: list[tuple[int, float]] = []

    def log(self, row: dict[str, Any]) -> None:
        super().log(row)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.at.append((row["step"], pages * resource.getpagesize() / 2**20))

    def mean(self, first: int, last: int) -> float:
        values = [size for step, size in self.at if first < step <= last]
        return sum(values) / len(values)


def main() -> None:
    given = dict(word.partition("=")[::2] for word in sys.argv[1:])
    steps, count = int(given.get("steps", 10000)), int(given.get("runs", 1000))
    lines = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        words = [*_SMALL, f"cache_dir={place / 'cache'}"]
        run = build(config.checked(composition.composed([*words, f"train.steps={steps}"])))
        memory = Memory(run, place)
        loop.fit(run, memory, place)
        first, last = memory.mean(0, steps // 10), memory.mean(steps - steps // 10, steps)
        lines.append(
            f"Resident memory of {steps} meta-steps of MAML: {first:.1f} MiB over the first tenth, {last:.1f} MiB over the last "
            f"({last - first:+.1f} MiB)."
        )
        print(lines[-1], flush=True)

        first_run = place / "sweep/0"
        command = [
            sys.executable,
            "-m",
            "metalearn",
            "train",
            *words,
            "train.steps=500",
            f"hydra.run.dir={first_run}",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        size = (first_run / "metrics.jsonl").stat().st_size / len(
            (first_run / "metrics.jsonl").read_text().splitlines()
        )
        lines.append(
            f"A row of `metrics.jsonl` has {size:.0f} bytes, so {steps} steps with `log_every=50` write {size * steps / 50 / 1024:.0f} KiB."
        )
        for number in range(1, count):
            copy = place / f"sweep/{number}"
            shutil.copytree(first_run, copy, ignore=shutil.ignore_patterns("checkpoints", "*.png"))
            seed, rate = (
                number % 10,
                0.1 + 0.01 * (number // 10),
            )  # a hundred methods, ten seeds each
            settings = OmegaConf.load(copy / "config.yaml")
            settings.seed, settings.algo.inner_lr = seed, rate
            OmegaConf.save(settings, copy / "config.yaml")
            result = json.loads((copy / "result.json").read_text()) | {"seed": seed}
            (copy / "result.json").write_text(json.dumps(result))
        start = time.perf_counter()
        compare([place / "sweep"], place / "compared", Console(file=io.StringIO(), width=200))
        lines.append(
            f"`metalearn compare` over {count} runs (a hundred settings, ten seeds each): {time.perf_counter() - start:.1f} s."
        )
        print(lines[-1], flush=True)
    environment = report.environment("cpu")
    lines.append(
        f"`python scripts/bench_long.py steps={steps} runs={count}`, commit {environment['commit']}, {environment['hardware']}, "
        f"torch {torch.__version__}."
    )
    fill(ROOT / "docs/reliability.md", "long: written by scripts/bench_long.py", lines)


if __name__ == "__main__":
    main()
