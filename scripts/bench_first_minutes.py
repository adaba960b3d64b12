"""Measure how long a new user waits: a fresh clone, an empty environment, README's commands.

python scripts/bench_first_minutes.py

Clones this checkout's last commit into a temporary folder and runs there, with empty cache
folders: `make setup`, `make demo-label`, `make demo-draw` until the page is served, `make demo`.
Downloads of packages count. Writes the table of docs/start.md.
"""

import os
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from pages import ROOT, fill

from metalearn.report import tables
from metalearn.report.environment import describe_environment

_PORT = 8431
#: What is run, and what the user then has.
_COMMANDS = {
    "make setup": "an environment with all extras",
    "make demo-label": "labels and a report for 45 images, from five examples of each class",
    f"make demo-draw DEMO=port={_PORT}": "the drawing page, with a trained model",
    "make demo": "the table of a trained and tested MAML",
}


def seconds(command: str, folder: Path, environment: dict[str, str]) -> float:
    """Return the seconds until a command ends, or until it serves its page."""
    start = time.perf_counter()
    process = subprocess.Popen(command.split(), cwd=folder, env=environment, start_new_session=True)
    if "demo-draw" not in command:
        if process.wait():
            raise SystemExit(f"{command} ended with exit code {process.returncode}")
        return time.perf_counter() - start
    try:
        while process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{_PORT}/") as page:
                    page.read()
                return time.perf_counter() - start
            except urllib.error.URLError:
                time.sleep(0.1)
        raise SystemExit(f"{command} ended with exit code {process.returncode}")
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def main() -> None:
    """Run the commands and write the table."""
    about = describe_environment("cpu")
    hidden = ("METALEARN_DATA", "PYTHONPATH", "VIRTUAL_ENV")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "metalearn"
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        for key in ("METALEARN_CACHE", "UV_CACHE_DIR", "PIP_CACHE_DIR"):
            environment[key] = str(Path(name) / key.lower())
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        total = 0.0
        for command, what in _COMMANDS.items():
            total += (own := seconds(command, folder, environment))
            shown = command.partition(" DEMO")[0]
            rows.append(
                {
                    "command": f"`{shown}`",
                    "gives": what,
                    "seconds": f"{own:.0f}",
                    "minutes since the clone": f"{total / 60:.1f}",
                }
            )
    line = (
        f"`python scripts/bench_first_minutes.py`, commit {about['commit']}, {about['hardware']}, "
        "packages from a registry nearby:"
    )
    fill(
        ROOT / "docs/start.md",
        "minutes: written by scripts/bench_first_minutes.py",
        [line, "", *tables.markdown_table(rows)],
    )


if __name__ == "__main__":
    main()
