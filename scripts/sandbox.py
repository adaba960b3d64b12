"""A temporary folder in which commands run, to inject faults."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metalearn.report.folder import RunFolder
from metalearn.run import checkpoint

_SMALL = (
    "dataset=glyphs", "dataset.num_classes=60", "dataset.image_size=16", "backbone.filters=8",
    "episode.query=3", "train.meta_batch=2", "train.log_every=5", "val.every=20", "val.episodes=10",
    "test.episodes=20", "checkpoint.every=10", "engine.threads=1",
)  # fmt: skip
#: Parts of the lines that report an error or a warning.
_MARKS = (
    "metalearn: ",
    "corrupt",
    "W&B: failed",
    "cannot be reached",
    "previous checkpoint",
    "skipped",
    "SIGTERM:",
)


class Sandbox:
    """A temporary folder with its own caches, in which commands run."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.run = folder / "run"
        self.environment = {
            **os.environ,
            "METALEARN_CACHE": str(folder / "cache"),
            "METALEARN_DATA": str(folder / "data"),
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
        }

    def start(
        self, *args: str, limit: Callable[[], None] | None = None, output: Any = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        """Start a metalearn command; `limit` runs first in the child, to set resource limits."""
        return subprocess.Popen(
            [sys.executable, "-m", "metalearn", *args],
            cwd=self.folder,
            env=self.environment,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=limit,
        )

    def start_training(
        self,
        *args: str,
        steps: int = 40,
        logger: str = "none",
        **options: Any,
    ) -> subprocess.Popen[str]:
        """Start a small training in the run folder; options as for `start`."""
        small = (*_SMALL, f"train.steps={steps}", f"logger={logger}", f"hydra.run.dir={self.run}")
        return self.start("train", "algo=protonet", *small, *args, **options)

    def train(self, *args: str, **options: Any) -> tuple[int, str]:
        """Train as `start_training` does; return the exit code and the error or warning line."""
        return self.finish(self.start_training(*args, **options))

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Wait for a process; return its exit code and its error or warning line."""
        output, errors = process.communicate(timeout=300)
        if "Traceback" in errors or (process.returncode == 1 and len(errors.splitlines()) != 1):
            raise RuntimeError(errors)
        lines = [
            line for line in (errors + output).splitlines() if any(mark in line for mark in _MARKS)
        ]
        return process.returncode, (lines[0] if lines else "").replace(str(self.folder), "…")

    def wait_for_steps(self, process: subprocess.Popen[str]) -> None:
        """Wait until the run has logged its first training step."""
        while not (file := self.run / "metrics.jsonl").exists() or not file.stat().st_size:
            if process.poll() is not None:
                raise RuntimeError(process.communicate()[1])
            time.sleep(0.05)

    def latest_checkpoint(self) -> str:
        """Describe the checkpoint that a resumed run would start from."""
        latest = checkpoint.latest(RunFolder(self.run), lambda line: None)
        return f"intact checkpoint of step {latest['step']}" if latest else "no checkpoint"

    def resume(self, *args: str, logger: str = "none") -> str:
        """Resume the run and describe the outcome."""
        code, line = self.train("resume=auto", *args, logger=logger)
        finished = code == 0 and (self.run / "result.json").exists()
        return "resumed and finished" if finished else f"resumed: exit code {code}, {line}"

    @property
    def state(self) -> str:
        """Say whether the run finished."""
        return "the run finished" if (self.run / "result.json").exists() else "no result"
