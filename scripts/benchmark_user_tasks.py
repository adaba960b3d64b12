"""Predict the ratings of new users from five of each: MAML, fine-tuning and two baselines.

python scripts/benchmark_user_tasks.py [key=value …]

Ratings are generated (scripts/generated_ratings.py). All are tested on the same 1,000 tasks of test
users. Prints the table of docs/user-as-task.md; further words are settings of every run.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from generated_ratings import write
from runs import run
from sklearn.linear_model import Ridge

from metalearn.config import checking, composition
from metalearn.report.environment import describe_environment
from metalearn.run.build import build

_RUNS = Path("outputs/benchmark/user_tasks")
_SHAPE = ["dataset=user_values", "episode.shot=5", "episode.query=7", "engine.threads=1"]


def main() -> None:
    """Run what is not finished, and print the table."""
    _RUNS.mkdir(parents=True, exist_ok=True)
    table = _RUNS / "ratings.csv"
    write(table)
    common = [*_SHAPE, f"dataset.path={table.absolute()}", *sys.argv[1:]]
    settings = checking.check_config(composition.compose_config(["algo=maml", *common]))
    tasks = build(settings).test.draw(0, 1000)
    means, ridges = [], []
    for number in range(1000):
        x, y = tasks.support.x[number].numpy(), tasks.support.y[number].numpy()
        query, truth = tasks.query.x[number].numpy(), tasks.query.y[number].numpy()
        means.append(((y.mean() - truth) ** 2).mean())
        ridges.append(((Ridge().fit(x, y[:, 0]).predict(query) - truth[:, 0]) ** 2).mean())
    print("| method | mean squared error |\n|---|---|")
    for name, errors in (("mean of the five ratings", means), ("ridge regression", ridges)):
        half = 1.96 * np.std(errors) / len(errors) ** 0.5
        print(f"| {name} | {np.mean(errors):.3f} ± {half:.3f} |", flush=True)
    for algo in ("finetune", "maml"):
        result = run(_RUNS / algo, [f"algo={algo}", *common], [])
        error = result["test"]["mse"]
        print(f"| `algo={algo}` | {error['mean']:.3f} ± {error['ci95']:.3f} |", flush=True)
    environment = describe_environment("cpu")
    print(f"commit {environment['commit']}, {environment['hardware']}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
