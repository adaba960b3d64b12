"""Measure MAML, Reptile, Meta-SGD and fine-tuning on sinusoids (Finn et al. 2017, figures 2 and 3).

python scripts/benchmark_sinusoid.py [key=value …]

Writes the error over inner steps and fitted curves to benchmarks/sinusoid.json, the table in
docs/results.md, docs/figures/sinusoid_steps.png and docs/figures/sinusoid_fits.png. Runs are in
outputs/benchmark/sinusoid/<method>/; a finished one with the same settings is skipped.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from pages import ROOT, fill
from runs import run

import metalearn
from metalearn.report import tables
from metalearn.report.plots import draw_lines, new_figure
from metalearn.report.tables import format_interval
from metalearn.system.atomic import write_json
from metalearn.tasks import prng

_RUNS = Path("outputs/benchmark/sinusoid")
_METHODS = ("maml", "meta_sgd", "reptile", "finetune")
_STEPS = (0, 1, 10)
#: Larger than the mean squared error without adaptation (about 3.1).
_DIVERGED = 4.0
_AMPLITUDE, _PHASE = 3.0, 1.0
#: Ranges of the ten support points of a fitted curve.
_RANGES = {"points anywhere": (-5.0, 5.0), "points in one half": (0.0, 5.0)}


def steps_curve(folder: Path) -> list[dict[str, float]]:
    """Evaluate the test error after each number of inner steps, and drop the diverged ones.

    Returns:
        One row per number of steps: steps, mean, ci95, episodes.
    """
    command = [sys.executable, "-m", "metalearn", "evaluate", f"run={folder}", "curve=steps"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with next((folder / "evaluations").glob("*_steps_curve.csv")).open() as file:
        rows = [
            {name: float(row[name]) for name in ("steps", "mean", "ci95", "episodes")}
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if row["mean"] < _DIVERGED]


def fits(folder: Path, steps: list[int]) -> dict[str, Any]:
    """Fit ten points of one sinusoid: for each range of points, a curve per number of steps."""
    model = metalearn.load(folder)
    grid = torch.linspace(-5, 5, 201)[:, None]
    results: dict[str, Any] = {}
    for number, (name, (low, high)) in enumerate(_RANGES.items()):
        x = low + (high - low) * prng.uniform(prng.key_of(number), (10, 1))
        y = _AMPLITUDE * torch.sin(x - _PHASE)
        results[name] = {
            "points": (x.flatten().tolist(), y.flatten().tolist()),
            "truth": (
                grid.flatten().tolist(),
                (_AMPLITUDE * torch.sin(grid - _PHASE)).flatten().tolist(),
            ),
            "curves": {
                f"{number} steps": model.adapt(x, y, steps=number).predict(grid).flatten().tolist()
                for number in steps
            },
        }
    return results


def _score(row: dict[str, float] | None) -> str:
    return format_interval("mse", row["mean"], row["ci95"]) if row else "diverged"


def draw_fits(methods: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot fitted curves: one column per method, one row per support set.

    Args:
        methods: Maps each method and row title to {"points": (x, y), "truth": (x, y),
            "curves": {label: y}}.
        path: PNG file to write.
    """
    titles = list(next(iter(methods.values())))
    with new_figure(path, 3 * len(methods), 2.6 * len(titles)) as figure:
        panels = figure.subplots(len(titles), len(methods), sharex=True, sharey=True, squeeze=False)
        for column, (method, fits) in enumerate(methods.items()):
            for row, title in enumerate(titles):
                axes, fit = panels[row][column], fits[title]
                axes.plot(*fit["truth"], color="0.7", linewidth=3, label="truth")
                for label, y in fit["curves"].items():
                    axes.plot(fit["truth"][0], y, linewidth=1, label=label)
                axes.plot(*fit["points"], "k^", markersize=5, label="support set")
                axes.set_title(f"{method}, {title}", fontsize=9)
                axes.grid(alpha=0.3)
        panels[0][0].legend(fontsize=7)


def main() -> None:
    """Train the methods and write the results, the table and the figures."""
    results = {
        name: run(_RUNS / name, [f"algo={name}", "dataset=sinusoid"], sys.argv[1:])
        for name in _METHODS
    }
    curves = {name: steps_curve(_RUNS / name) for name in _METHODS}
    write_json(ROOT / "benchmarks/sinusoid.json", {"results": results, "error_over_steps": curves})
    by_steps = {name: {int(row["steps"]): row for row in rows} for name, rows in curves.items()}
    rows = [
        {
            "`algo=`": f"`{name}`",
            **{f"{steps} steps": _score(by_steps[name].get(steps)) for steps in (0, 1, 5, 10)},
            "training steps": result["steps"],
            "minutes": f"{result['seconds'] / 60:.1f}",
            "commit": result["environment"]["commit"],
        }
        for name, result in results.items()
    ]  # fmt: skip
    fill(
        ROOT / "docs/results.md",
        "sinusoid: written by scripts/benchmark_sinusoid.py",
        tables.markdown_table(rows),
    )
    figures = ROOT / "docs/figures"
    lines = {
        name: [(row["steps"], row["mean"], row["ci95"]) for row in rows]
        for name, rows in curves.items()
    }
    draw_lines(lines, "inner steps", "test mse", figures / "sinusoid_steps.png")
    fitted = {
        name: fits(_RUNS / name, [steps for steps in _STEPS if steps in by_steps[name]])
        for name in _METHODS
    }
    draw_fits(fitted, figures / "sinusoid_fits.png")
    print(json.dumps({name: result["test"] for name, result in results.items()}, indent=1))


if __name__ == "__main__":
    main()
