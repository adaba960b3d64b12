"""Commit, versions and hardware of a result."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import metalearn


def describe_environment(device: str) -> dict[str, Any]:
    """Commit, versions and hardware: what a figure depends on besides its configuration."""
    import torch

    cuda = torch.device(device).type == "cuda"
    return {
        "commit": _commit(),
        "versions": {
            "metalearn": metalearn.__version__,
            "python": platform.python_version(),
            **{
                name: metadata.version(name)
                for name in ("torch", "torchvision", "hydra-core", "numpy")
            },
        },
        "hardware": torch.cuda.get_device_name()
        if cuda
        else f"{_processor()}, {torch.get_num_threads()} threads",
    }


def _commit() -> str | None:
    """The commit of the checkout this package runs from, with a + when its code or conf/ has changes; None when installed."""
    root = Path(metalearn.__file__).parent.parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():
        return None
    changed = git(
        "status", "--porcelain", "-uno", "--", "metalearn", "conf"
    )  # what a figure depends on
    return f"{git('rev-parse', '--short=10', 'HEAD')}{'+' if changed else ''}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
