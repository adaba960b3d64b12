"""metalearn: few-shot and meta-learning experiments, with figures that can be trusted."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from metalearn.run.load import Model

__version__ = "0.1.0"
__all__ = ["load"]


def load(
    run_folder: "str | Path",
    statistics: str | None = None,
    device: str = "auto",
    plugins: "Iterable[str]" = (),
) -> "Model":
    """Load a trained run to adapt it to a few labelled examples: see `metalearn.run.load.load`."""
    from metalearn.run import load  # here, because torch takes seconds

    return load.load(run_folder, statistics, device, plugins)
