"""Compare heads on the same features: seconds, and accuracy with balanced and unbalanced queries.

python scripts/benchmark_heads.py [threads=1]
python scripts/benchmark_heads.py cifar100=<folder> [threads=1 meta=500 frozen=100] [key=value …]

The first command measures CPU seconds: predictions of 1,000 tasks on features of 640 numbers, as in
a test, and how well a batch of tasks agrees with a loop over tasks. The second measures
accuracy on CIFAR-FS: SimpleShot trains a backbone and keeps the mean of its training features; the
heads without weights are tested on these features, and on those of frozen EfficientNet-Lite0. The
heads with weights are meta-trained with the backbone from there, for `meta` steps of one 20-way
1-shot episode. With the frozen backbone, every training has `frozen` steps. All tests use the same
episodes, with balanced and with unbalanced queries. `key=value` are overrides of the runs, such as
train.steps=500 test.episodes=200 backbone=resnet12; those of the backbone are not for the frozen
one. Runs and scores are in outputs/benchmark/heads/; finished ones are not repeated. Each command
writes its part of benchmarks/heads.json, and heads.md.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pages import ROOT
from runs import run as run_in
from torch import Tensor
from torch.utils import _pytree as pytree

from metalearn.algorithms.base import Algorithm
from metalearn.config import checking, composition
from metalearn.engine import Engine
from metalearn.report import tables
from metalearn.report.environment import describe_environment
from metalearn.report.progress import SILENT
from metalearn.report.stats import Difference, estimate, paired_difference
from metalearn.report.tables import format_difference, format_interval
from metalearn.run import features, scoring
from metalearn.run.build import build
from metalearn.run.measure import trained_state
from metalearn.run.parts import algorithm_of
from metalearn.system.atomic import write_json
from metalearn.tasks.ranges import parts_of
from metalearn.tasks.types import State, Task

_RUNS = Path("outputs/benchmark/heads")
#: Heads without weights of their own; the first two are inductive.
_HEADS = (
    "simple_shot", "rfs", "bd_cspn", "laplacian_shot", "transductive_finetune", "tim", "pt_map",
)  # fmt: skip
#: Heads that are meta-trained from the backbone of SimpleShot.
_META = ("meta_baseline", "feat", "frn", "metaopt_svm")
#: Heads that assume classes of equal frequency among the queries.
_BALANCED = ("tim", "pt_map")
_TRAINED, _FROZEN = "trained", "frozen EfficientNet-Lite0"
#: Parameter of the Dirichlet distribution of unbalanced queries (Veilleux et al. 2021).
_DIRICHLET = 2
#: Training steps of the heads with weights, and of every head on frozen features.
_STEPS = {"meta": "500", "frozen": "100"}
_TASKS = 1000
_BATCH = 32
_NO_NET = ["dataset=gaussians", "backbone.hidden=[]", "backbone.normalisation=none", "device=cpu"]


def settings(words: list[str]) -> Any:
    """Return the checked configuration of overrides."""
    return checking.check_config(composition.compose_config([*words, "logger=none"]))


def head(name: str) -> Algorithm:
    """Return a head whose backbone is the identity."""
    return algorithm_of(settings([f"algo={name}", *_NO_NET]))


def in_parts(engine: Engine, state: State, tasks: Task, method: str) -> Tensor:
    """Return scores or predictions of tasks, computed in batches like those of a test."""
    count = len(tasks.key)
    parts = []
    for at in range(0, count, _BATCH):
        part = pytree.tree_map(lambda leaf, at=at: leaf[at : at + _BATCH], tasks)
        parts.append(getattr(engine, method)(state, part))
    return torch.cat(parts)


def speed(name: str, shot: int) -> dict[str, Any]:
    """Measure the seconds of a head for 1,000 tasks, and its agreement with a loop over tasks."""
    words = [
        f"algo={name}", *_NO_NET, "dataset.features=640",
        "dataset.informative=20", "dataset.noise_std=1.5", f"dataset.examples={shot + 15}",
        f"episode.shot={shot}", "episode.query=15",
    ]  # fmt: skip
    run = build(settings(words))
    tasks, own = run.test.draw(0, _TASKS), run.test_engine
    own = dataclasses.replace(own, strategy="auto", chunk=_BATCH)
    engine = own.resolve(tasks, _BATCH, False)
    in_parts(engine, run.state, run.test.draw(0, _BATCH), "predictions")
    start = time.process_time()
    in_parts(engine, run.state, tasks, "predictions")
    seconds = time.process_time() - start
    few = run.test.draw(0, 100)
    together = Engine(run.algorithm, "vmap", _BATCH).predictions(run.state, few)
    loop = Engine(run.algorithm, "loop", 1)
    start = time.process_time()
    alone = loop.predictions(run.state, few)
    return {
        "seconds": seconds,
        "loop": (time.process_time() - start) * _TASKS / 100,
        "strategy": engine.strategy,
        "same": float((alone.argmax(-1) == together.argmax(-1)).float().mean()),
        "difference": float((alone.softmax(-1) - together.softmax(-1)).abs().max()),
    }


def stored(file: Path, key: list[str], compute: Callable[[], Tensor]) -> Tensor:
    """Return the scores in a file, [E]; compute and write them first if its key is different."""
    own = json.loads(file.read_text()) if file.exists() else {}
    if own.get("key") != key:
        own = {"key": key, "scores": compute().tolist()}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, own)
    return torch.tensor(own["scores"])


def shared_scores(name: str, words: list[str], folder: Path) -> Tensor:
    """Test a head without weights on the features of SimpleShot's run."""
    run = build(settings(words), "test")
    state = trained_state(run, folder)
    parts = parts_of(run.test, 0, run.config.test.episodes, _BATCH)
    base, source = features.with_features(
        run, run.test_engine, run.test, state, parts, SILENT, _BATCH
    )
    algorithm = dataclasses.replace(head(name), backbone=base.algorithm.backbone)
    engine = Engine(algorithm, "auto", _BATCH).resolve(source.draw(0, 1), _BATCH, False)
    return torch.cat([engine.scores(state, source.draw(*part)) for part in parts])


def meta_scores(words: list[str], folder: Path) -> Tensor:
    """Test a meta-trained head."""
    run = build(settings(words), "test")
    return scoring.test(run, trained_state(run, folder), None).scores


def accuracy(cifar100: Path, backbone: str, more: list[str], meta: int, frozen: int) -> Any:
    """Train SimpleShot's backbone, then test every head on the same episodes."""
    # The overrides of `more` are later than the script's own, except the number of steps.
    own, steps = [], []
    if backbone == _FROZEN:
        own = ["backbone=efficientnet_lite0", "train.lr=0.001", "val.episodes=10"]
        more = [word for word in more if not word.startswith(("backbone", "train.steps="))]
        steps = [f"train.steps={frozen}", f"val.every={frozen}"]
    shared = ["dataset=cifar_fs", f"dataset.path={cifar100}", "episode=5w1s", *own, *more]
    top = _RUNS / backbone.replace(" ", "_").lower()
    first = top / "simple_shot"
    words = {"simple_shot": ["algo=simple_shot", *shared, *steps]}
    trained = {"simple_shot": run_in(first, words["simple_shot"], [])}
    from_there = [f"train.start={first}", "train.lr=0.0002"] if backbone == _TRAINED else []
    from_there += steps or [f"train.steps={meta}", f"val.every={meta}"]
    for name in _META:
        words[name] = [f"algo={name}", *shared, *from_there]
        trained[name] = run_in(top / name, words[name], [])
    tests: dict[str, Any] = {}
    for shot in (1, 5):
        for dirichlet in (0, _DIRICHLET):
            title = f"5w{shot}s, {'unbalanced' if dirichlet else 'balanced'}"
            shape = [f"episode.shot={shot}", f"episode.dirichlet={dirichlet}"]
            scores = {}
            for name in (*_HEADS, *_META):
                key = [*words.get(name, words["simple_shot"]), *shape]
                folder = top / (name if name in words else "simple_shot")
                test = functools.partial(meta_scores, key, folder)
                if name in _HEADS:
                    test = functools.partial(shared_scores, name, key, folder)
                key = [
                    *key,
                    repr(settings([f"algo={name}"]).algo),  # its defaults may change
                    *(str(run["steps"]) for run in trained.values()),
                ]
                scores[name] = stored(top / "scores" / f"{title}, {name}.json", key, test)
            tests[title] = {
                name: {
                    **dataclasses.asdict(estimate(values)),
                    "minus simple_shot": dataclasses.asdict(
                        paired_difference(values, scores["simple_shot"])
                    ),
                }
                for name, values in scores.items()
            }
            print(
                backbone,
                title,
                {n: round(float(s.mean()), 4) for n, s in scores.items()},
                flush=True,
            )
    runs = {
        name: {
            "overrides": [word for word in own if not word.startswith("dataset.path=")],
            "test": trained[name]["test"],
        }
        for name, own in words.items()
    }
    return {"runs": runs, "tests": tests}


def write(part: str, values: dict[str, Any]) -> None:
    """Write a part of benchmarks/heads.json, and the page with all parts."""
    file = ROOT / "benchmarks/heads.json"
    content = json.loads(file.read_text()) if file.exists() else {}
    content[part] = values
    write_json(file, content)
    lines = ["# Heads on the same features", ""]
    if speeds := content.get("seconds"):
        rows = [
            {
                "head": name,
                **{
                    key: text
                    for shot, one in by_shot.items()
                    for key, text in {
                        shot: f"{one['seconds']:.1f} ({one['strategy']})",
                        f"{shot}, loop over tasks": f"{one['loop']:.1f}",
                        f"{shot}, same labels": f"{100 * one['same']:.2f}%",
                        f"{shot}, largest difference": f"{one['difference']:.0e}",
                    }.items()
                },
            }
            for name, by_shot in speeds["heads"].items()
        ]
        lines += [
            "## CPU seconds", "", f"Predictions of {_TASKS:,} tasks with 15 queries per class on "
            "features of 640 numbers with the strategy that a test chooses (`vmap`: a batch of "
            "tasks at once); the same in a loop over tasks (100 of them, times 10). A batch "
            "against the loop: share of queries with the same label; largest difference of a "
            "probability.", "", *tables.markdown_table(rows), "", _about(speeds), "",
        ]  # fmt: skip
    for backbone, own in content.get("accuracy", {}).get("backbones", {}).items():
        lines += [f"## CIFAR-FS, {backbone}", ""]
        if backbone == _FROZEN:
            lines += ["Classes of CIFAR overlap those of ImageNet, which this network knows.", ""]
        lines += ["```sh"]
        for one in own["runs"].values():
            lines += [f"metalearn train {' '.join(one['overrides'])}"]
        lines += ["```", ""]
        for title, heads in own["tests"].items():
            table = [
                {
                    "head": f"{name} (assumes balance)" if name in _BALANCED else name,
                    "accuracy": format_interval("accuracy", one["mean"], one["ci95"]),
                    "minus simple_shot, same episodes": ""
                    if name == "simple_shot"
                    else format_difference("accuracy", Difference(**one["minus simple_shot"])),
                }
                for name, one in heads.items()
            ]
            lines += [f"{title} queries:", "", *tables.markdown_table(table), ""]
    if "accuracy" in content:
        lines += [_about(content["accuracy"]), ""]
    (ROOT / "benchmarks/heads.md").write_text("\n".join(lines))


def _about(part: dict[str, Any]) -> str:
    """Return the line that says how a part was made."""
    own = part["environment"]
    return (
        f"`{part['command']}`, commit {own['commit']}, {own['hardware']}, "
        f"torch {own['versions']['torch']}, seed 0."
    )


def main() -> None:
    """Measure and write the tables."""
    options = dict(arg.partition("=")[::2] for arg in sys.argv[1:])
    shown = [f"{k}=<folder>" if k == "cifar100" else f"{k}={v}" for k, v in options.items()]
    cifar100, threads = options.pop("cifar100", None), int(options.pop("threads", "1"))
    meta, frozen = (int(options.pop(key, default)) for key, default in _STEPS.items())
    torch.set_num_threads(threads)
    more = [f"engine.threads={threads}", *(f"{key}={value}" for key, value in options.items())]
    values: dict[str, Any] = {
        "command": " ".join(["python scripts/benchmark_heads.py", *shown]),
        "environment": describe_environment("cpu"),
    }
    if cifar100 is None:
        values["heads"] = {}
        for name in ("protonet", *_HEADS):
            values["heads"][name] = {f"5w{shot}s": speed(name, shot) for shot in (1, 5)}
            print(name, values["heads"][name], flush=True)
        write("seconds", values)
        return
    values["backbones"] = {}
    for backbone in (_TRAINED, _FROZEN):
        folder = Path(cifar100).resolve()
        values["backbones"][backbone] = accuracy(folder, backbone, more, meta, frozen)
        write("accuracy", values)


if __name__ == "__main__":
    main()
