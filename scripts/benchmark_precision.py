"""Compare gradients and trained accuracy of engine.precision=mixed and bf16 with those of fp32.

python scripts/benchmark_precision.py data_dir=<folder with omniglot> [steps=300] [only=maml]

Cosines are those of the meta-gradient at initialisation, on four tasks of glyphs. Accuracy is that
of 400 test episodes in fp32 after `steps` steps on Omniglot (8 filters, 8 tasks a step, 5 queries).
Takes a minute or two a row. Writes benchmarks/precision.json and .md after each row; rows that are
in the file are not computed again.
"""

import dataclasses
import json
import sys
from typing import Any

import torch
from pages import ROOT
from plain_loop import build_run

from metalearn.engine import Engine
from metalearn.report.environment import describe_environment
from metalearn.report.stats import estimate
from metalearn.run import scoring
from metalearn.run.step import Training

_METHODS = {
    "MAML, 1 step": ["algo=maml", "algo.inner_steps=1", "algo.inner_lr=0.4"],
    "MAML, 5 steps": ["algo=maml", "algo.inner_steps=5", "algo.inner_lr=0.1"],
    "first-order MAML, 1 step": ["algo=fomaml", "algo.inner_steps=1", "algo.inner_lr=0.4"],
    "first-order MAML, 5 steps": ["algo=fomaml", "algo.inner_steps=5", "algo.inner_lr=0.1"],
    "ANIL, 1 step": ["algo=anil", "algo.inner_steps=1", "algo.inner_lr=0.4"],
    "ProtoNet": ["algo=protonet"],
}
_LOW = ("mixed", "bf16")


def cosines(words: list[str]) -> dict[str, list[float]]:
    """Return the smallest and largest cosine with the gradient in fp32, of loop and vmap."""
    values: dict[str, list[float]] = {name: [] for name in _LOW}
    for queries in (1, 15):
        shape = [f"episode.train.query={queries}", "train.meta_batch=4", "engine.threads=1"]
        run = build_run([*words, *shape], "cpu")
        tasks = run.train.draw(0, 4)
        for strategy in ("loop", "vmap"):
            flat = {}
            for precision in ("fp32", *_LOW):
                step = Engine(run.algorithm, strategy, 4, precision).step(
                    run.state, tasks, torch.zeros(())
                )
                flat[precision] = torch.cat(
                    [value.double().flatten() for value in step.gradients.values()]
                )
            for name in _LOW:
                values[name].append(float(torch.cosine_similarity(flat[name], flat["fp32"], dim=0)))
    return {name: [min(each), max(each)] for name, each in values.items()}


def accuracy(words: list[str], precision: str, steps: int) -> list[float]:
    """Train in a precision, test in fp32; return the mean accuracy and its 95% half-width."""
    run = build_run(
        [
            *words, "dataset=omniglot", "backbone.filters=8", "train.meta_batch=8",
            "episode.train.query=5", f"train.steps={steps}", "train.lr=0.003", "test.episodes=400",
            "engine.convolution=plain",
        ],
        "cpu",
    )  # fmt: skip
    # Not by the setting, which refuses bf16 where this shows that it is wrong.
    engine = dataclasses.replace(run.train_engine, precision=precision)
    training = Training(dataclasses.replace(run, train_engine=engine))
    for _ in range(steps):
        training.load_tasks()
        training.meta_step()
        training.count()
    result = estimate(scoring.test(run, training.tested_state, None).scores)
    return [result.mean, result.ci95]


def page(content: dict[str, Any]) -> list[str]:
    """Return the lines of the Markdown file."""
    environment = content["environment"]
    lines = [
        "# Precision",
        "",
        f"`scripts/benchmark_precision.py` at commit {environment['commit']}, "
        f"{environment['hardware']}, torch {environment['versions']['torch']}, seed 0. Cosine of "
        "the meta-gradient with that of fp32 (loop and vmap, 1 and 15 queries, smallest to "
        f"largest); accuracy after {content['steps']} steps on Omniglot 5w1s with 8 filters.",
        "",
        "| method | cosine, mixed | cosine, bf16 | trained in fp32 | in mixed | in bf16 |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in content["rows"].items():
        cells = [
            # 6 digits: those of `mixed` differ from 1 in the fifth
            f"{low:.6f} to {high:.6f}" if kind == "mixed" else f"{low:.2f} to {high:.2f}"
            for kind, (low, high) in row["cosine"].items()
        ]
        cells += [
            f"{100 * mean:.1f} ± {100 * ci95:.1f}" if mean else ""
            for mean, ci95 in (row.get(kind, (0, 0)) for kind in ("fp32", *_LOW))
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Compute the rows that are missing and write the files."""
    options = dict(arg.partition("=")[::2] for arg in sys.argv[1:])
    if "data_dir" not in options:
        sys.exit(__doc__)
    steps, file = int(options.get("steps", "300")), ROOT / "benchmarks" / "precision.json"
    content = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    content |= {"steps": steps, "environment": describe_environment("cpu")}
    for name, words in _METHODS.items():
        if options.get("only", "") not in words[0]:
            continue
        row = content["rows"].setdefault(name, {})
        for part in ("cosine", "fp32", *_LOW):
            if part not in row:
                row[part] = (
                    cosines(words)
                    if part == "cosine"
                    else accuracy([*words, f"data_dir={options['data_dir']}"], part, steps)
                )
                print(name, part, row[part], flush=True)
            file.write_text(json.dumps(content, indent=1) + "\n")
            file.with_suffix(".md").write_text("\n".join(page(content)) + "\n")


if __name__ == "__main__":
    main()
