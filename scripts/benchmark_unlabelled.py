"""Measure what unlabelled examples add to prototypes: paired gains of all variants of soft_kmeans.

python scripts/benchmark_unlabelled.py [steps=400] [more=200] [key=value …]

Prototypes are trained on Omniglot for `steps` steps. From there, prototypes and each variant of
soft_kmeans are trained for `more` steps, with 5 unlabelled examples of each class and of 5
distractor classes. All are tested on the same 5-way 1-shot episodes, with and without distractors.
"plain, as trained" refines the prototypes of the first run, without more training. `key=value` are
overrides of all runs. Runs are in outputs/benchmark/unlabelled/; finished ones are not repeated.
Writes benchmarks/unlabelled.json and unlabelled.md.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from pages import ROOT, wrap
from runs import run as run_in
from torch import Tensor

from metalearn.config import checking, composition
from metalearn.report import tables
from metalearn.report.environment import describe_environment
from metalearn.report.stats import estimate, paired_difference
from metalearn.report.tables import format_difference, format_interval
from metalearn.run import scoring
from metalearn.run.build import build
from metalearn.run.measure import trained_state
from metalearn.system.atomic import write_json

_RUNS = Path("outputs/benchmark/unlabelled")
_VARIANTS = ("plain", "distractor_cluster", "masked")
_DISTRACTORS = (0, 5)
#: Omniglot has 20 examples of each class; 20-way training fits minutes on a CPU.
_COMMON = [
    "dataset=omniglot", "episode=5w1s", "episode.query=10", "episode.train.way=20",
    "episode.train.query=5", "algo.temperature=null",
]  # fmt: skip
_UNLABELLED = [
    "episode.unlabelled=5", "episode.train.unlabelled=5", "episode.train.distractors=5",
]  # fmt: skip


def scores(words: list[str], folder: Path, distractors: int) -> Tensor:
    """Test a run on episodes with unlabelled examples, [E]."""
    shape = ["episode.unlabelled=5", f"episode.distractors={distractors}", "logger=none"]
    config = checking.check_config(composition.compose_config([*words, *shape]))
    run = build(config, "test")
    return scoring.test(run, trained_state(run, folder), None).scores


def main() -> None:
    """Train, test and write the table."""
    options = dict(arg.partition("=")[::2] for arg in sys.argv[1:])
    command = " ".join(["python scripts/benchmark_unlabelled.py", *sys.argv[1:]])
    steps, more = options.pop("steps", "400"), options.pop("more", "200")
    torch.set_num_threads(int(options.get("engine.threads", "0")) or torch.get_num_threads())
    common = [*_COMMON, *(f"{key}={value}" for key, value in options.items())]
    first = _RUNS / "protonet"
    run_in(first, ["algo=protonet", *common, f"train.steps={steps}", f"val.every={steps}"], [])
    from_there = [*_UNLABELLED, f"train.start={first}", f"train.steps={more}", f"val.every={more}"]
    runs = {"prototypes": (["algo=protonet", *common], _RUNS / "prototypes")}
    for variant in _VARIANTS:
        words = ["algo=soft_kmeans", f"algo.variant={variant}", *common]
        runs[variant] = (words, _RUNS / variant)
    for words, folder in runs.values():
        run_in(folder, [*words, *from_there], [])
    runs["plain, as trained"] = (runs["plain"][0], first)
    runs["prototypes, as trained"] = (runs["prototypes"][0], first)
    content: dict[str, Any] = {
        "command": command, "environment": describe_environment("cpu"), "tests": {},
    }  # fmt: skip
    rows: dict[str, dict[str, str]] = {name: {"method": name} for name in runs}
    for distractors in _DISTRACTORS:
        title = f"{distractors} distractor classes"
        values = {name: scores(*run, distractors) for name, run in runs.items()}
        content["tests"][title] = {}
        for name, own in values.items():
            mean = estimate(own)
            base = "prototypes, as trained" if "as trained" in name else "prototypes"
            gain = paired_difference(own, values[base])
            content["tests"][title][name] = {
                **dataclasses.asdict(mean), "gain": dataclasses.asdict(gain),
            }  # fmt: skip
            rows[name][f"accuracy, {title}"] = format_interval("accuracy", mean.mean, mean.ci95)
            rows[name][f"gain, {title}"] = (
                "" if name == base else format_difference("accuracy", gain)
            )
    write_json(ROOT / "benchmarks/unlabelled.json", content)
    about = content["environment"]
    lines = [
        "# What unlabelled examples add to prototypes", "",
        *wrap([
            "Omniglot, 5-way 1-shot, with 5 unlabelled examples of each class, and of each "
            "distractor class. The gain is over prototypes on the same episodes: with as much "
            f"training ({steps} and {more} steps), or, for the rows *as trained*, with the weights "
            f"of the first {steps} steps. 10 queries per class.",
        ]),
        "", *tables.markdown_table(list(rows.values())), "",
        f"`{command}`, commit {about['commit']}, {about['hardware']}, torch "
        f"{about['versions']['torch']}, seed 0.", "",
    ]  # fmt: skip
    (ROOT / "benchmarks/unlabelled.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
