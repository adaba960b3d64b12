"""Resume an interrupted run."""

import os
from pathlib import Path

from metalearn.system.errors import UserError

HELP = """metalearn resume <folder>

Resumes an interrupted run from its last intact checkpoint. On a CPU, the result is bit-for-bit
identical to that of an uninterrupted run. A finished run is shown again. Equivalent to repeating
the run's command with hydra.run.dir=<folder> resume=auto.

To resume a multirun, repeat its command with the same hydra.sweep.dir.
"""
#: What shell completion offers.
TAKES: tuple[str, ...] = ("{folder}",)


def main(args: list[str]) -> int:
    """Run the command. Return the exit code."""
    if len(args) != 1 or args[0].startswith("-"):
        raise UserError("resume: takes one folder, that of a run; see metalearn resume --help")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "resume: with torchrun, repeat the run's command with hydra.run.dir=… and resume=auto"
        )
    from metalearn.report.console import open_console
    from metalearn.run.train import resume

    resume(Path(args[0]), open_console())
    return 0
