"""Measure the error on sinusoids over the number of points: in-context learning beside MAML.

python scripts/benchmark_points.py [key=value …]

Both are trained with 1 to 20 points; MAML also with 10, as in Finn et al. (2017). Writes
benchmarks/points.json, the table in docs/algorithms/in_context.md and
docs/figures/sinusoid_points.png. Runs are in outputs/benchmark/points/<name>/; a finished one with
the same settings is skipped. Settings apply to all runs.
"""

import csv
import subprocess
import sys
from pathlib import Path

from pages import ROOT, fill
from runs import run

from metalearn.report import tables
from metalearn.report.plots import draw_lines
from metalearn.report.tables import format_interval
from metalearn.system.atomic import write_json

_RUNS = Path("outputs/benchmark/points")
_METHODS = {
    "in_context": ["algo=in_context"],
    "maml, 10 steps": ["algo=maml", "episode.train.shot=[1,20]"],
    "maml on 10 points, 10 steps": ["algo=maml"],
}
#: A larger error means that the inner steps diverged; such points are left out.
_DIVERGED = 20.0
_POINTS = (1, 2, 3, 5, 7, 10, 15, 20)


def points_curve(folder: Path, more: list[str]) -> list[tuple[float, float, float]]:
    """Evaluate a run with each number of points; return (points, mean, ci95) of the error."""
    devices = [word for word in more if word.startswith(("device=", "test.episodes="))]
    command = [sys.executable, "-m", "metalearn", "evaluate", f"run={folder}", "curve=shot"]
    rows: list[dict[str, str]] = []
    for points in _POINTS:
        for old in (folder / "evaluations").glob("*_shot_curve.csv"):
            old.unlink()
        done = subprocess.run([*command, f"at={points}", *devices], stdout=subprocess.DEVNULL)
        if done.returncode == 1:  # predictions are not finite: diverged
            continue
        done.check_returncode()
        with next((folder / "evaluations").glob("*_shot_curve.csv")).open() as file:
            rows += csv.DictReader(file)
    every = [(float(row["shot"]), float(row["mean"]), float(row["ci95"])) for row in rows]
    return [one for one in every if one[1] < _DIVERGED]  # false also for NaN


def main() -> None:
    """Train the methods and write the results, the table and the figure."""
    more, curves, rows, results = sys.argv[1:], {}, [], {}
    for name, settings in _METHODS.items():
        folder = _RUNS / name.replace(",", "").replace(" ", "_")
        results[name] = result = run(folder, [*settings, "dataset=sinusoid"], more)
        curves[name] = points_curve(folder, more)
        errors = dict.fromkeys(map(str, _POINTS), "diverged") | {
            f"{points:.0f}": format_interval("mse", mean, ci95)
            for points, mean, ci95 in curves[name]
        }
        rows.append(
            {"method": name} | errors
            | {"steps": result["steps"], "minutes": f"{result['seconds'] / 60:.1f}",
               "commit": result["environment"]["commit"]}
        )  # fmt: skip
    write_json(ROOT / "benchmarks/points.json", {"results": results, "error_over_points": curves})
    fill(
        ROOT / "docs/algorithms/in_context.md",
        "points: written by scripts/benchmark_points.py",
        tables.markdown_table(rows),
    )
    draw_lines(curves, "points", "test mse", ROOT / "docs/figures/sinusoid_points.png")


if __name__ == "__main__":
    main()
