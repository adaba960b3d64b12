"""metalearn: few-shot and meta-learning experiments, with figures that can be trusted."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from metalearn.predict.classifier import FewShotClassifier
    from metalearn.run.load import Model

__version__ = "0.1.0"
__all__ = ["FewShotClassifier", "load"]


def load(
    run_folder: "str | Path",
    statistics: str | None = None,
    device: str = "auto",
    plugins: "Iterable[str]" = (),
) -> "Model":
    """Load a trained run to adapt it to a few labelled examples: see `metalearn.run.load.load`."""
    from metalearn.run import load  # here, because torch takes seconds

    return load.load(run_folder, statistics, device, plugins)


def __getattr__(name: str) -> Any:
    if name != "FewShotClassifier":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from metalearn.predict.classifier import FewShotClassifier  # takes seconds, too

    return FewShotClassifier
