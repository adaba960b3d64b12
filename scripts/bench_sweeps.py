"""Kill sweeps in the middle, repeat them, and write benchmarks/sweeps.md.

python scripts/bench_sweeps.py [launchers=basic,joblib,submitit_local]

With each of Hydra's launchers, a sweep of 12 small runs is killed (SIGKILL, with all its workers)
once a third of its runs have finished, and then repeated. Finished runs must not be trained again,
and every run must equal the one of an uninterrupted sweep.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pages import ROOT
from same_run import difference, left

from metalearn.report.environment import describe_environment
from metalearn.report.tables import markdown_table

_RUNS = 12
_SWEEP = (
    "train", "-m", "algo=protonet,maml", f"seed={','.join(map(str, range(_RUNS // 2)))}",
    "dataset=glyphs", "dataset.num_classes=60", "dataset.image_size=16", "backbone.filters=8",
    "episode.query=3", "train.steps=60", "train.meta_batch=2", "val.every=20", "val.episodes=20",
    "test.episodes=100", "checkpoint.every=10", "logger=none", "engine.threads=1",
)  # fmt: skip
#: Settings of each launcher: two runs at a time, where it can.
_LAUNCHERS = {
    "basic": (),
    "joblib": ("hydra.launcher.n_jobs=2",),
    "submitit_local": ("hydra.launcher.timeout_min=30", "hydra.sweeper.max_batch_size=2"),
}


def start(folder: Path, launcher: str) -> subprocess.Popen[bytes]:
    """Start the sweep in a process group of its own."""
    words = [*_SWEEP, f"hydra/launcher={launcher}", *_LAUNCHERS[launcher]]
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "metalearn", *words, f"hydra.sweep.dir={folder}"],
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def finished(folder: Path) -> dict[str, float]:
    """Return when each finished run was written, by its number."""
    return {path.parent.name: path.stat().st_mtime for path in folder.glob("*/result.json")}


def kill(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Kill the sweep and all workers that have its folder in their command or environment."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)
        except (OSError, ProcessLookupError):
            continue


def measure(launcher: str, folder: Path, reference: Path) -> dict[str, object]:
    """Kill and repeat a sweep; return a row of the table."""
    process = start(folder, launcher)
    while len(finished(folder)) < _RUNS // 3:
        if process.poll() is not None:
            sys.exit(f"{launcher}: the sweep ended before it was killed; see {folder}.log")
        time.sleep(0.05)
    kill(process, folder)
    before = finished(folder)
    started = time.perf_counter()
    if start(folder, launcher).wait():
        sys.exit(f"{launcher}: the repeated sweep failed; see {folder}.log")
    seconds = time.perf_counter() - started
    after = finished(folder)
    differing = [name for name in after if difference(left(folder / name), left(reference / name))]
    return {
        "hydra/launcher=": launcher,
        "finished when killed": f"{len(before)} of {_RUNS}",
        "trained again": sum(after[name] != before[name] for name in before),
        "equal to the uninterrupted sweep": f"{len(after) - len(differing)} of {_RUNS}",
        "seconds of the second start": f"{seconds:.0f}",
    }


def main() -> None:
    """Measure each launcher and write the page."""
    names = dict(word.split("=", 1) for word in sys.argv[1:]).get("launchers", "")
    launchers = names.split(",") if names else list(_LAUNCHERS)
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference"
        if start(reference, "basic").wait():
            sys.exit(f"the uninterrupted sweep failed; see {reference}.log")
        rows = [measure(one, Path(folder) / one, reference) for one in launchers]
    environment = describe_environment("cpu")
    lines = [
        "# Sweeps, killed and repeated", "",
        f"`python scripts/bench_sweeps.py`, commit {environment['commit']}, "
        f"{environment['hardware']}: a sweep of {_RUNS}",
        "runs (ProtoNet and MAML, six seeds) is",
        "killed with all its workers and started again by the same command.", "",
        *markdown_table(rows),
    ]  # fmt: skip
    page = ROOT / "benchmarks/sweeps.md"
    page.write_text("\n".join(lines) + "\n")
    print(page.read_text())


if __name__ == "__main__":
    main()
