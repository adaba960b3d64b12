"""Measure training without labels on Omniglot, 5-way 1-shot (CACTUs, Hsu et al. 2019).

python scripts/benchmark_cactus.py [methods=protonet,maml] [simclr=3000] [steps=protonet:1000,…]
    [seeds=1] [key=value …]

Trains SimCLR, then each method on clusters of its embeddings, on true labels and on random classes,
and compares their accuracies on the same test episodes. `simclr` and `steps` are numbers of steps;
`key=value` are settings of all runs, and decide the dataset: dataset=glyphs needs no download.

Runs are in outputs/benchmark/cactus/, one after the other with one thread; a finished one with the
same settings is skipped. Writes benchmarks/cactus.json and the table of docs/unsupervised.md; with
`key=value`, only outputs/benchmark/cactus/cactus.json.
"""

import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any

from pages import ROOT, fill
from runs import run

from metalearn.report.folder import RunFolder
from metalearn.report.scores import read_scores
from metalearn.report.stats import paired_difference
from metalearn.report.tables import format_difference, format_interval, markdown_table
from metalearn.system.atomic import write_json

_RUNS = Path("outputs/benchmark/cactus")
_STEPS = {"protonet": 1000, "maml": 3000}
#: Hsu et al. (2019), table 1: Omniglot, 5-way 1-shot, clusters of ACAI embeddings, in percent.
_PUBLISHED = {"maml": "68.8", "protonet": "68.1"}
_SETTINGS = ["dataset=omniglot", "episode=5w1s", "val.every=500", "val.episodes=200",
             "engine.threads=1", "episode.train.query=5"]  # fmt: skip


def measured(
    methods: list[str], steps: dict[str, int], simclr: int, seed: int, more: list[str]
) -> list[dict[str, Any]]:
    """Return one row for each method and kind of training labels, the embedding's first."""
    settings = [*_SETTINGS, f"seed={seed}"]
    embedding = _RUNS / f"simclr-{simclr}-seed{seed}"
    rows = [
        _row("simclr", "none", run(embedding, ["algo=simclr", *settings, f"train.steps={simclr}"],
                                   more), embedding)
    ]  # fmt: skip
    # A run on clusters depends on these weights, not on their path.
    weights = hashlib.sha256(RunFolder(embedding).best.read_bytes()).hexdigest()[:8]
    kinds = {
        "clusters": (weights, ["dataset.labels=clusters", f"dataset.clusters_of={embedding}"]),
        "true": ("true", []),
        "random": ("random", ["dataset.labels=random"]),
    }
    for method in methods:
        for kind, (name, words) in kinds.items():
            folder = _RUNS / f"{method}-{name}-seed{seed}"
            own = [f"algo={method}", *settings, f"train.steps={steps[method]}", *words]
            rows.append(_row(method, kind, run(folder, own, more), folder))
    return rows


def _row(method: str, labels: str, result: dict[str, Any], folder: Path) -> dict[str, Any]:
    print(f"{method} on {labels}: {result['test']['accuracy']['mean']:.4f}", flush=True)
    return {"method": method, "labels": labels, "folder": str(folder), "result": result}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table of one seed."""
    scores = {
        (one["method"], one["labels"]): read_scores(Path(one["folder"]) / "test_scores.csv")
        for one in rows
    }
    lines = []
    for one in rows:
        method, labels, result = one["method"], one["labels"], one["result"]
        test = result["test"]["accuracy"]
        difference = ""
        if labels == "clusters":
            own = paired_difference(scores[method, labels], scores[method, "random"])
            one["minus random"] = dataclasses.asdict(own)
            difference = format_difference("accuracy", own)
        lines.append({
            "`algo=`": f"`{method}`",
            "training labels": labels,
            "test": format_interval("accuracy", test["mean"], test["ci95"]),
            "minus random, same episodes": difference,
            "published": _PUBLISHED[method] if labels == "clusters" else "",
            "steps": result["steps"],
            "minutes": f"{result['seconds'] / 60:.0f}",
            "seed": result["seed"],
            "commit": result["environment"]["commit"],
        })  # fmt: skip
    return markdown_table(lines)


def main() -> None:
    """Run what is asked for, and write the table."""
    words = dict(word.split("=", 1) for word in sys.argv[1:])
    methods = words.pop("methods", ",".join(_STEPS)).split(",")
    simclr, seeds = int(words.pop("simclr", 3000)), int(words.pop("seeds", 1))
    given = dict(word.split(":") for word in words.pop("steps", "").split(",") if word)
    steps = _STEPS | {method: int(number) for method, number in given.items()}
    more = [f"{key}={value}" for key, value in words.items()]
    content: list[dict[str, Any]] = []
    lines: list[str] = []
    for seed in range(seeds):
        rows = measured(methods, steps, simclr, seed, more)
        lines += [*table(rows), ""]
        content += rows
    print("\n".join(lines))
    if more:
        write_json(_RUNS / "cactus.json", content)
        return
    write_json(ROOT / "benchmarks/cactus.json", content)
    command = " ".join(["python scripts/benchmark_cactus.py", *sys.argv[1:]])
    lines = [f"`{command}`, {rows[0]['result']['environment']['hardware']}:", "", *lines[:-1]]
    fill(ROOT / "docs/unsupervised.md", "results: written by scripts/benchmark_cactus.py", lines)


if __name__ == "__main__":
    main()
