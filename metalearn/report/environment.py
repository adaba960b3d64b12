"""Record the commit, versions and hardware of a result."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import metalearn


def describe_environment(device: str) -> dict[str, Any]:
    """Return the commit, versions and hardware, which a result on a torch device depends on too."""
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
    """Return the checkout's commit, with "+" if code or conf/ has changes; None if installed."""
    root = Path(metalearn.__file__).parent.parent

    def git(*arguments: str) -> str | None:
        try:
            process = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return process.stdout.strip() if process.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():
        return None
    # Only files that a result depends on.
    changes = git("status", "--porcelain", "-uno", "--", "metalearn", "conf")
    return f"{git('rev-parse', '--short=10', 'HEAD')}{'+' if changes else ''}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
