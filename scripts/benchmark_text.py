"""Measure few-shot intent classification on published folds, without and with meta-training.

python scripts/benchmark_text.py data=<folder> [folds=5] [key=value …]

`data` has text/{clinc150,banking77,hwu64}. Prototypes (cosine) and logistic regression on hashed
n-grams and on a frozen sentence encoder need no training and are tested on all folds; ProtoNet and
MAML train a small transformer on the first. Further words are settings of every run. Writes
benchmarks/text.json and benchmarks/text.md. `run=false` starts no run: rows of unfinished runs are
those of an earlier benchmarks/text.json, or missing.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from runs import run

from metalearn.report.console import open_console
from metalearn.report.environment import describe_environment
from metalearn.report.folder import RunFolder
from metalearn.run.evaluate import evaluate_several
from metalearn.system.atomic import write_json

_OUT = Path(__file__).parent.parent / "benchmarks" / "text.json"
_RUNS = Path("outputs/benchmark/text")
_DATASETS = ("clinc150", "banking77", "hwu64")
_UNTRAINED = ["train.steps=0", "test.episodes=1000"]
_TRAINED = ["val.episodes=100", "test.episodes=1000"]
_METHODS = {
    "hashed n-grams, prototypes": [
        "algo=protonet", "algo.distance=cosine", "backbone=bag_of_ngrams", *_UNTRAINED,
    ],
    "MiniLM, prototypes": [
        "algo=protonet", "algo.distance=cosine", "backbone=text_encoder", *_UNTRAINED,
    ],
    "MiniLM, logistic regression": ["algo=rfs", "backbone=text_encoder", *_UNTRAINED],
    "transformer, ProtoNet": [
        "algo=protonet", "algo.distance=cosine", "backbone=text_transformer",
        "train.steps=300", "val.every=100", *_TRAINED,
    ],
    # With an inner rate of 0.5, it does not learn.
    "transformer, MAML": [
        "algo=maml", "backbone=text_transformer", "algo.inner_lr=0.05", "algo.inner_steps=3",
        "algo.test_inner_steps=5", "train.meta_batch=8", "train.clip_norm=10",
        "episode.train.query=5", "train.steps=150", "val.every=50", *_TRAINED,
    ],
}  # fmt: skip


def main() -> None:
    """Run what is not finished, and write both files."""
    given = dict(word.partition("=")[::2] for word in sys.argv[1:])
    data, folds = given.pop("data"), int(given.pop("folds", 5))
    is_run = given.pop("run", "true") == "true"
    earlier = json.loads(_OUT.read_text()) if _OUT.exists() else {"rows": []}
    known = {_key(row): {"commit": earlier.get("commit"), **row} for row in earlier["rows"]}
    common = ["engine.threads=1", f"data_dir={Path(data).absolute()}"]
    common += [f"{key}={value}" for key, value in given.items()]
    rows: list[dict[str, Any]] = []
    for name, settings in _METHODS.items():
        for dataset in _DATASETS:
            for shot in (1, 5):
                for fold in range(1, folds + 1 if "train.steps=0" in settings else 2):
                    words = [
                        *settings, f"dataset={dataset}", f"dataset.split={dataset}/{fold}",
                        f"episode=5w{shot}s", *common,
                    ]  # fmt: skip
                    folder = _RUNS / f"{name.replace(', ', '-').replace(' ', '_')}-{dataset}"
                    folder /= f"{shot}-fold{fold}"
                    row = {"method": name, "dataset": dataset, "shot": shot, "fold": fold}
                    if is_run or RunFolder(folder).is_finished:
                        result = run(folder, words, [])
                        row |= result["test"]["accuracy"]
                        row["commit"] = result["environment"]["commit"]
                    elif _key(row) in known:
                        row = known[_key(row)]
                    else:
                        continue
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                if is_run and "train.steps=0" in settings:
                    folder = folder.with_name(f"{shot}-fold1")
                    tested = evaluate_several(
                        [folder], [f"{dataset}:all"], [], "test", open_console()
                    )["results"][0]
                    row = {"method": name, "dataset": dataset, "shot": shot, "fold": "all"}
                    row |= tested["test"]["accuracy"]
                    rows.append(row | {"commit": tested["environment"]["commit"]})
                elif known.get((name, dataset, shot, "all")):
                    rows.append(known[name, dataset, shot, "all"])
    environment = describe_environment("cpu")
    content = {"rows": rows, "hardware": environment["hardware"]}
    write_json(_OUT, content)
    _OUT.with_suffix(".md").write_text(_page(content))


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("method", "dataset", "shot", "fold"))


def _page(content: dict[str, Any]) -> str:
    cells: dict[str, dict[Any, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in content["rows"]:
        place = f"{row['method']}, all classes" if row["fold"] == "all" else row["method"]
        cells[place][row["dataset"], row["shot"]].append(row)
    columns = [(dataset, shot) for dataset in _DATASETS for shot in (1, 5)]
    lines = [
        "# Intents from a few texts",
        "",
        "Accuracy in %, 5-way, 15 queries a class, 1,000 test episodes a fold (Dopierre et al.",
        "2021), mean over five folds or as stated (lowest to highest); for trained networks fold 1",
        "with its 95% interval. MiniLM (all-MiniLM-L6-v2) was trained on a billion pairs of",
        "sentences; whether these are among them is not known. The transformer knows only the",
        "training classes; it is trained on 9,600 tasks (ProtoNet) or 1,200 (MAML). `all classes`:",
        "episodes from all classes, not only those of a fold's test; these are easier, since they",
        "have more domains.",
        "",
        f"| method | {' | '.join(f'{dataset}, {shot}-shot' for dataset, shot in columns)} |",
        f"|{'---|' * (len(columns) + 1)}",
    ]
    for method, own in cells.items():
        texts = []
        for column in columns:
            if not (means := [100 * row["mean"] for row in own[column]]):
                texts.append("not measured")
                continue
            single = f"{means[0]:.1f} ± {100 * own[column][0]['ci95']:.1f}"
            few = "" if len(means) == 5 else f"; {len(means)} folds"
            several = f"{statistics.mean(means):.1f} ({min(means):.1f} to {max(means):.1f}{few})"
            texts.append(single if len(means) == 1 else several)
        lines.append(f"| {method} | {' | '.join(texts)} |")
    commits = ", ".join(sorted({row["commit"] for row in content["rows"]}))
    lines += ["", f"`python scripts/benchmark_text.py data=<folder>`, commits {commits} (of each",
              f"row in text.json), {content['hardware']}, seed 0."]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
