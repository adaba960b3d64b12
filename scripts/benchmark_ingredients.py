"""Measure what weight decay and augmentation give on CIFAR-FS.

python scripts/benchmark_ingredients.py data=<folder> [key=value …]

Trains rfs without both, with each and with both, and ProtoNet with and without augmentation, and
tests every run with 1 and 5 shots. Further words are settings of every run. Finished runs in
outputs/benchmark/ingredients are kept. Writes benchmarks/ingredients.md.
"""

import json
import sys
from pathlib import Path
from typing import Any

from runs import run

from metalearn.report.console import open_console
from metalearn.report.tables import format_interval, markdown_table
from metalearn.run.evaluate import evaluate_several

_OUT = Path(__file__).parent.parent / "benchmarks" / "ingredients.md"
_RUNS = Path("outputs/benchmark/ingredients")
_RFS = [
    "algo=rfs", "backbone.halvings=null", "backbone.output=flatten", "train.steps=17500",
    "val.every=1750",
]  # fmt: skip
_PROTONET = ["algo=protonet", "train.steps=1250"]
_ROWS = {
    "rfs, neither": [*_RFS, "augment=none", "optimiser.weight_decay=0"],
    "rfs, weight decay": [*_RFS, "augment=none"],
    "rfs, augmentation": [*_RFS, "optimiser.weight_decay=0"],
    "rfs, both": _RFS,
    "ProtoNet": _PROTONET,
    "ProtoNet, augmentation": [*_PROTONET, "augment=cifar"],
}


def main() -> None:
    """Run what is not finished, test with 1 and 5 shots, and write the page."""
    data, *more = [word.removeprefix("data=") for word in sys.argv[1:]]
    common = [
        "dataset=cifar_fs", "episode=5w1s", "statistics=population", "test.episodes=1000",
        "engine.threads=1", f"data_dir={Path(data).absolute()}", *more,
    ]  # fmt: skip
    rows, folders = [], [_RUNS / name.replace(", ", "-").replace(" ", "_") for name in _ROWS]
    results = [
        run(folder, [*words, *common], [])
        for folder, words in zip(folders, _ROWS.values(), strict=True)
    ]
    where = [f"data_dir={Path(data).absolute()}", "episode.shot=5", "test.episodes=1000"]
    tested = evaluate_several(folders, [], where, "test", open_console())
    five = {}
    for result, file in zip(tested["results"], tested["files"], strict=True):
        if result["protocol"]["statistics"] == "population":
            five[Path(file).parent.parent] = result
    for name, folder, result in zip(_ROWS, folders, results, strict=True):
        logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        last: dict[str, Any] = {}
        for line in logged:
            last |= line
        rows.append(
            {
                "training": name,
                "5-way 1-shot": _shown(result),
                "5-way 5-shot": _shown(five[folder]),
                "training accuracy": f"{100 * last['train.accuracy']:.1f}",
                "last validation, 1-shot": f"{100 * last['val.accuracy']:.1f}",
                "steps": result["steps"],
                "minutes": f"{result['seconds'] / 60:.0f}",
                "commit": result["environment"]["commit"],
            }
        )
    environment = results[-1]["environment"]
    text = [
        "# Weight decay and augmentation",
        "",
        "CIFAR-FS, Conv4-64, seed 0, 1,000 test episodes with 15 queries, population statistics.",
        "rfs: SGD, batches of 64, rate divided by 10 after 60% and 80% of the steps; weight decay",
        "5e-4; crop, colour jitter and flip. ProtoNet: 20-way episodes, Adam. Training accuracy is",
        "the last one logged: over batches of 64 classes (rfs) or over 20-way episodes, with",
        "augmentation where there is some. Minutes are those of a busy machine.",
        "",
        *markdown_table(rows),
        "",
        f"`python scripts/benchmark_ingredients.py data=<folder>`, {environment['hardware']}, "
        f"torch {environment['versions']['torch']}.",
    ]
    _OUT.write_text("\n".join(text) + "\n")


def _shown(result: dict[str, Any]) -> str:
    ((metric, score),) = result["test"].items()
    return format_interval(metric, score["mean"], score["ci95"])


if __name__ == "__main__":
    main()
