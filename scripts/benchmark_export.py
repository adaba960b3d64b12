"""Export every method to ONNX, and write benchmarks/export.md.

python scripts/benchmark_export.py

Trains each method for two steps on letters, and exports the run with `metalearn export`, which
compares probabilities in onnxruntime. A classifier on each kind of network is exported as well.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import onnxscript
import torch
from pages import ROOT
from rich.console import Console

from metalearn.config import choices, composition
from metalearn.predict import heads, inputs
from metalearn.predict.classifier import FewShotClassifier
from metalearn.predict.export import TOLERANCE, export_classifier, export_run
from metalearn.report.environment import describe_environment
from metalearn.report.tables import markdown_table
from metalearn.run.train import train
from metalearn.system.atomic import write_text
from metalearn.system.errors import UserError

_SMALL = [
    "dataset=glyphs", "dataset.num_classes=60", "dataset.image_size=16", "backbone.filters=8",
    "episode.query=3", "train.steps=2", "val.episodes=4", "test.episodes=6", "logger=none",
    "engine.threads=1", "device=cpu",
]  # fmt: skip


def _row(what: str, export: Callable[[Path, Path], dict[str, float]], folder: Path) -> dict:
    start = time.perf_counter()
    try:
        result, is_exported = f"{max(export(folder, folder / 'it.onnx').values()):.1e}", "yes"
    except UserError as error:
        result, is_exported = str(error).partition("cannot be exported: ")[2], "no"
    seconds = f"{time.perf_counter() - start:.0f}"
    print(what, is_exported, result, seconds, flush=True)
    return {"": what, "exported": is_exported, "largest difference, or reason": result,
            "seconds": seconds}  # fmt: skip


def main() -> None:
    """Export all, and write the page."""
    torch.set_num_threads(1)
    rows, classifiers = [], []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for algo in choices.options("algo"):
            config = composition.compose_config([*_SMALL, f"algo={algo}"])
            train(config, root / algo, f"{algo} glyphs", [], Console(quiet=True))
            rows.append(_row(algo, export_run, root / algo))
        items = inputs.examples(str(ROOT / "examples/bccd/support"), root)
        paths, labels = [item.value for item in items], [item.label for item in items]
        for head in heads.HEADS:
            classifier = FewShotClassifier("efficientnet_lite0", head).fit(paths, labels)
            classifier.save(root / head)
            classifiers.append(_row(f"efficientnet_lite0, {head}", export_classifier, root / head))
    environment = describe_environment("cpu")
    versions = (
        f"{one.__name__} {one.__version__}" for one in (torch, onnx, onnxscript, onnxruntime)
    )
    write_text(ROOT / "benchmarks/export.md", "\n".join([
        "# Export to ONNX", "",
        "Made by `python scripts/benchmark_export.py` at commit "
        f"`{str(environment['commit'])[:7]}` on {environment['hardware']}; "
        f"{', '.join(versions)}. Each number is the largest absolute difference of a probability "
        "between onnxruntime and this package, over the inputs that `metalearn export` lists; "
        f"above {TOLERANCE:.0e} the command fails. Seconds include tracing and comparison.", "",
        "## Methods as one graph: support images, labels and query images", "",
        *markdown_table(rows), "", "## Classifiers on blood cells, five examples per class", "",
        *markdown_table(classifiers), "",
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
