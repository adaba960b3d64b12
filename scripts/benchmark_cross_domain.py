"""Test networks on datasets that they were not trained on: one table.

python scripts/benchmark_cross_domain.py data=<folder> [targets=a,b:all] [key=value …]

`data` has omniglot, cifar100 and images/{caltech101,deeppcb,bccd}. Trains ProtoNet on CIFAR-FS and
on Omniglot, and takes EfficientNet-Lite0 as it is. Further words are settings of both trainings.
Writes benchmarks/cross_domain.json and benchmarks/cross_domain.md.
"""

import json
import sys
from pathlib import Path
from typing import Any

from runs import run

from metalearn.report.console import open_console
from metalearn.report.environment import describe_environment
from metalearn.report.tables import format_score, markdown_table
from metalearn.run.evaluate import evaluate_several
from metalearn.system.atomic import write_json
from metalearn.tasks.types import Estimate

_OUT = Path(__file__).parent.parent / "benchmarks" / "cross_domain.json"
_RUNS = Path("outputs/benchmark/cross_domain")
_NETWORKS = {
    "ProtoNet, trained on CIFAR-FS": ["algo=protonet", "dataset=cifar_fs"],
    "ProtoNet, trained on Omniglot": ["algo=protonet", "dataset=omniglot"],
    "EfficientNet-Lite0, frozen": [
        "algo=protonet", "algo.distance=cosine", "dataset=cifar_fs", "dataset.image_size=84",
        "backbone=efficientnet_lite0", "backbone.image_size=128", "train.steps=0", "val.episodes=2",
    ],
}  # fmt: skip


def main() -> None:
    """Train what is not trained yet, test everything, and write both files."""
    given = dict(word.partition("=")[::2] for word in sys.argv[1:])
    data = Path(given.pop("data")).absolute()
    images = [f"{data}/images/{name}:all" for name in ("caltech101", "deeppcb", "bccd")]
    targets = given.pop("targets", ",".join([*images, "fc100"])).split(",")
    episodes = f"test.episodes={given.pop('test.episodes', 1000)}"
    settings = [f"{key}={value}" for key, value in given.items()]
    folders = [_RUNS / name.replace(", ", "-").replace(" ", "_") for name in _NETWORKS]
    for folder, words in zip(folders, _NETWORKS.values(), strict=True):
        common = [f"data_dir={data}", "engine.threads=1", "statistics=population", episodes]
        run(folder, [*words, *common, *(settings if "train.steps=0" not in words else [])], [])
    rows: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    for shot in (1, 5):
        for words in ([], targets):
            tested = evaluate_several(
                folders, words, [f"episode.shot={shot}", episodes], "test", open_console()
            )
            failures += tested["failures"]
            for result, file in zip(tested["results"], tested["files"], strict=True):
                network = list(_NETWORKS)[folders.index(Path(file).parent.parent)]
                rows.append({"network": network, "shot": shot, "result": result})
    environment = describe_environment("cpu")
    content = {
        "rows": rows, "failures": failures, "commit": environment["commit"],
        "hardware": environment["hardware"],
        "command": " ".join(["python scripts/benchmark_cross_domain.py data=<folder>", *settings]),
    }  # fmt: skip
    write_json(_OUT, json.loads(json.dumps(content).replace(str(data), "<folder>")))
    _OUT.with_suffix(".md").write_text(_page(content))


def _page(content: dict[str, Any]) -> str:
    table: dict[str, dict[str, str]] = {}
    for row in content["rows"]:
        result = row["result"]
        way, score = result["protocol"]["way"], Estimate(**result["test"]["accuracy"])
        heading = f"{_where(result)}, {way}-way {row['shot']}-shot"
        cells = {"test": heading, **dict.fromkeys(_NETWORKS, "refused")}
        table.setdefault(heading, cells)[row["network"]] = format_score("accuracy", score)
    notes = dict.fromkeys(
        f"- {Path(one['run']).name} on {one['dataset']}: {one['reason']}."
        for one in content["failures"]
    )
    for row in content["rows"]:
        if own := row["result"]["details"].get("pretraining"):
            found = f"at least {len(own['shared'])} of the {own['classes']} tested classes"
            where = f"{row['network']}, {_where(row['result'])}"
            notes[f"- {where}: {own['data']} contains {found}, by their names."] = None
    lines = [
        "# Datasets that a network was not trained on",
        "",
        "Accuracy with its 95% interval over the same test episodes, 15 queries a class, with",
        "population statistics. Images have the size, the channels and the normalisation of the",
        "training images of each network. All classes are tested, of FC100 the test classes. *Own",
        "test*: the test classes of the network's own dataset (EfficientNet: CIFAR-FS).",
        "",
        *markdown_table(list(table.values())),
        "",
        *notes,
        *([""] if notes else []),
        f"`{content['command']}`, commit {content['commit']}, {content['hardware']}, seed 0.",
    ]
    return "\n".join(lines) + "\n"


def _where(result: dict[str, Any]) -> str:
    chosen: dict[str, str] = dict(word.partition("=")[::2] for word in result["overrides"])
    if "dataset" not in chosen:
        return "own test"
    path: str = chosen.get("dataset.path", chosen["dataset"])
    return Path(path.strip("'\"")).stem


if __name__ == "__main__":
    main()
