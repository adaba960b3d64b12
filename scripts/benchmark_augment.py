"""Measure what augmentation costs, as a share of a training step.

python scripts/benchmark_augment.py [OVERRIDE ...]    for example data_dir=FOLDER device=cuda

Writes benchmarks/augment-<device>.md. ProtoNet and rfs train on CIFAR-FS by their recipes. The cost
is the time to draw the tasks of a step with an augmentation minus that without, each the fastest of
alternating calls, divided by the fastest step without augmentation.
"""

import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch

from metalearn.config import checking, composition
from metalearn.report.environment import describe_environment
from metalearn.run.build import Run, build
from metalearn.run.step import Training
from metalearn.tasks.augment import AUGMENTATIONS, input_kinds
from metalearn.tasks.mixing import MIXINGS
from metalearn.tasks.types import Task

_OUT = Path(__file__).parent.parent / "benchmarks"
_REPEATS = 30


def make_run(algo: str, overrides: list[str], *words: str) -> Run:
    """Build a run on CIFAR-FS without augmentation except that of `words`."""
    usual = [f"algo={algo}", "dataset=cifar_fs", "augment=none", "logger=none"]
    return build(checking.check_config(composition.compose_config([*usual, *words, *overrides])))


def seconds(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Return the seconds of the fastest of each of several calls, which alternate."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(_REPEATS + 2):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 2:  # the first calls allocate memory
                own.append(time.perf_counter() - start)
    return [min(own) for own in times]


def table(overrides: list[str]) -> tuple[list[str], torch.device]:
    """Return the lines of the table, and the device."""
    images = [name for name, one in AUGMENTATIONS.items() if "images" in input_kinds(one)]
    cases = {name: [f"augment={name}"] for name in ("cifar", "imagenet", "omniglot")}
    cases |= {name: [f"+augment.ops.{name}={{}}"] for name in images}
    cases |= {name: [f"+augment.mix.{name}={{}}"] for name in MIXINGS}
    columns = []
    for algo in ("protonet", "rfs"):
        plain = make_run(algo, overrides)
        runs = [plain, *(make_run(algo, overrides, *words) for words in cases.values())]
        count = plain.config.train.meta_batch
        calls = [functools.partial(run.train.draw, 0, count) for run in runs]
        *drawn, step = seconds([*calls, Training(plain).meta_step], plain.device)
        size = f"{count} x {plain.config.train.batch_size} images"
        if plain.config.train.source == "episodes":
            task = cast(Task, plain.train.draw(0, 1))
            size = f"{count} x {task.support.x.shape[1] + task.query.x.shape[1]} images"
        columns.append((f"{algo} ({size}, step {1000 * step:.0f} ms)", drawn, step))
    lines = [f"| augmentation | {' | '.join(name for name, _, _ in columns)} |", "|---|---|---|"]
    for number, name in enumerate(cases, start=1):
        costs = [
            f"{1000 * (drawn[number] - drawn[0]):.2f} ms, {(drawn[number] - drawn[0]) / step:.1%}"
            for _, drawn, step in columns
        ]
        lines.append(f"| {name} | {' | '.join(costs)} |")
    return lines, plain.device


def main() -> None:
    """Measure and write the table."""
    overrides = sys.argv[1:]
    lines, device = table(overrides)
    environment = describe_environment(str(device))
    words = [word for word in overrides if not word.startswith(("data_dir=", "cache_dir="))]
    command = " ".join(["python scripts/benchmark_augment.py", *words])
    head = [
        "# Cost of augmentation",
        "",
        f"`{command}`: additional time to draw the tasks of a step, and",
        f"its share of a training step on CIFAR-FS, Conv4-64. Commit {environment['commit'][:10]},",
        f"{environment['hardware']}, torch {environment['versions']['torch']}.",
        "",
    ]
    text = "\n".join([*head, *lines]) + "\n"
    (_OUT / f"augment-{'gpu' if device.type == 'cuda' else 'cpu'}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
