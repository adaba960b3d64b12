"""Train and test every method in benchmarks/methods.yaml and write the tables of methods.

python scripts/benchmark_methods.py [only=omniglot_5w1s] [methods=maml,…] [jobs=2] [key=value …]

Each run is in outputs/benchmark/methods/<table>/<method>/; …-untrained/ has a test of the same
method without training. A finished run with the same settings is skipped, an interrupted one
resumed. A method with a `network` is tested on that of another method, which must be finished; if
that one is trained again, delete the runs of these methods.

Results are written to benchmarks/methods/<table>/<method>.json, tables to
docs/accuracy.md and docs/algorithms/, curves to docs/figures/. `jobs` runs execute in parallel,
with one thread each. `only=none` runs nothing and writes the tables from benchmarks/methods/.
"""

import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from pages import ROOT, fill, wrap
from runs import run

from metalearn.config import choices
from metalearn.report import tables
from metalearn.report.folder import RunFolder
from metalearn.report.plots import draw_lines
from metalearn.report.result import Result
from metalearn.report.tables import format_interval
from metalearn.system.atomic import write_json

_RESULTS = ROOT / "benchmarks/methods"
_RUNS = Path("outputs/benchmark/methods")
#: A smaller difference from the published accuracy is not shown in "points short".
_TOLERANCE = 0.01
#: What the columns of the tables mean.
_LEGEND = (
    "`make benchmark-methods` runs the methods and writes these tables. *Test* is the accuracy "
    "with its 95% interval; *with 1 query*, that of the same weights with 1 query per class, if "
    "the published result was measured so; *published* is in percent; *points short*, how far "
    "the run is below it, if by more than 1 point; *untrained*, the test of the initial weights; "
    "*transductive* under statistics, a method that classifies all queries together. "
    "*those of ...* in place of steps: this method is tested on the trained network of that one. "
    "A blank means that there is no such number. `+` after a commit: with uncommitted changes."
)


def with_queries(folder: Path, query: int) -> dict[str, Any]:
    """Test the same weights with a different number of queries per class."""
    words = ["evaluate", f"run={folder}", f"episode.query={query}"]
    command = [sys.executable, "-m", "metalearn", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    protocol = json.loads(RunFolder(folder).result.read_text())["protocol"] | {"query": query}
    tests = [json.loads(path.read_text()) for path in (folder / "evaluations").glob("*.json")]
    return next(test for test in tests if test["protocol"] == protocol)


def measure(table: str, method: str, definition: dict[str, Any], more: list[str]) -> None:
    """Train and test one method of one table and save its results."""
    print(f"{table}: {method}", flush=True)
    one = definition["methods"][method]
    folder = _RUNS / table / method
    overrides = [f"algo={method}", *definition["settings"], *one.get("settings", [])]
    untrained = run(folder.with_name(f"{method}-untrained"), [*overrides, "train.steps=0"], more)
    if network := one.get("network"):
        overrides += [f"train.start={folder.with_name(network)}", "train.steps=0"]
    result = run(folder, overrides, more)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["tasks_per_second"] for row in rows if "tasks_per_second" in row]
    query = one.get("published", {}).get("query")
    content = {
        "result": result,
        "untrained": untrained["test"],
        "as_published": with_queries(folder, query) if query is not None else None,
        "tasks_per_second": statistics.median(speeds) if speeds else None,
        "curve": [
            {name: row[name] for name in row if name == "step" or name.startswith("val.")}
            for row in rows
            if "val.accuracy" in row
        ],
    }
    (_RESULTS / table).mkdir(parents=True, exist_ok=True)
    write_json(_RESULTS / table / f"{method}.json", content)
    print(f"{table}: {method} {_score(result['test'])}", flush=True)


def _score(test: dict[str, Any]) -> str:
    score, estimate = next(iter(test.items()))
    return format_interval(score, estimate["mean"], estimate["ci95"])


def _row(method: str, stored: dict[str, Any], definition: dict[str, Any]) -> dict[str, Any]:
    result, as_published = stored["result"], stored["as_published"]
    published, network = definition.get("published"), definition.get("network")
    speed = stored["tasks_per_second"]
    accuracy = (as_published or result)["test"]["accuracy"]["mean"]
    shortfall = published["mean"] - accuracy if published else 0.0
    unlabelled = result["protocol"].get("unlabelled")
    return {
        "`algo=`": f"`{method}`",
        "test": _score(result["test"]),
        "with 1 query": _score(as_published["test"]) if as_published else "",
        "published": f"{100 * published['mean']:.1f} ({published['source']})" if published else "",
        "points short": f"{100 * shortfall:.1f}" if shortfall > _TOLERANCE else "",
        "untrained": f"{100 * stored['untrained']['accuracy']['mean']:.1f}%",
        "statistics": Result.from_dict(result).statistics
        + (f", {unlabelled} unlabelled" if unlabelled else ""),
        "steps": f"those of `{network}`" if network else result["steps"],
        "best step": "" if network else result["best_step"],
        "tasks/s": "" if speed is None else f"{speed:.1f}",
        "minutes": f"{result['seconds'] / 60:.0f}",
        "commit": result["environment"]["commit"],
    }


def write_tables(definition: dict[str, Any]) -> None:
    """Write the tables and the pages of the methods, and plot the validation curves."""
    families = choices.families()
    order = [method for family in families.values() for method in family]
    lines = [*wrap([_LEGEND]), ""]
    pages: dict[str, list[dict[str, Any]]] = {method: [] for method in order}
    for table, content in definition.items():
        title = content["title"]
        files = {path.stem: path for path in (_RESULTS / table).glob("*.json")}
        stored = {m: json.loads(files[m].read_text()) for m in order if m in files}
        if not stored:
            continue
        rows = {
            method: _row(method, one, content["methods"][method]) for method, one in stored.items()
        }
        for method, row in rows.items():
            pages[method].append({"data": title} | {name: row[name] for name in list(row)[1:]})
        lines += [_heading(title, [one["result"] for one in stored.values()]), ""]
        lines += [*tables.markdown_table(list(rows.values())), ""]
        for family, methods in families.items():
            curves = {
                method: [
                    (row["step"], row["val.accuracy"], row["val.accuracy_ci95"])
                    for row in stored[method]["curve"]
                ]
                for method in methods
                if method in stored and "network" not in content["methods"][method]
            }
            if curves:
                path = ROOT / f"docs/figures/{table}_{family}.png"
                draw_lines(curves, "meta-training step", "validation accuracy", path)
    fill(ROOT / "docs/accuracy.md", "methods: written by scripts/benchmark_methods.py", lines)
    for method, entries in pages.items():
        page = ROOT / f"docs/algorithms/{method}.md"
        fill(
            page,
            "results: written by scripts/benchmark_methods.py",
            tables.markdown_table(entries)
            if entries
            else ["Not in the table of methods yet; [results](../results.md) may have other runs."],
        )


def _heading(title: str, results: list[dict[str, Any]]) -> str:
    """Return the heading of a table: what all its rows have in common."""
    protocol = results[0]["protocol"]
    samplers = sorted({one["protocol"].get("sampler", 1) for one in results})
    machines = {
        f"{one['environment']['hardware']}, torch {one['environment']['versions']['torch']}"
        for one in results
    }
    return (
        f"{title} ({protocol['episodes']} test episodes of sampler "
        f"{' and '.join(map(str, samplers))}, {protocol['query']} queries per class, "
        f"seed {results[0]['seed']}; {'; '.join(sorted(machines))}):"
    )


def _names(key: str, value: str, known: list[str]) -> list[str]:
    """Return the names in a comma-separated list, or all known ones if it is empty."""
    names = value.split(",") if value else known
    for name in names:
        if name not in known:
            sys.exit(f"{key}={name}: no such name; choose from {', '.join(known)}")
    return names


def main() -> None:
    """Run the methods of the tables and write the tables."""
    definition = yaml.safe_load((_RESULTS.with_suffix(".yaml")).read_text())
    options = dict(arg.partition("=")[::2] for arg in sys.argv[1:])
    only, methods = options.pop("only", ""), options.pop("methods", "")
    jobs = int(options.pop("jobs", "1"))
    more = [
        f"{key}={value}"
        for key, value in (({"engine.threads": "1"} if jobs > 1 else {}) | options).items()
    ]
    keys = [] if only == "none" else _names("only", only, list(definition))
    known = {name: None for key in keys or definition for name in definition[key]["methods"]}
    names = _names("methods", methods, list(known))
    with ThreadPoolExecutor(jobs) as pool:
        pending = [
            pool.submit(measure, table, method, definition[table], more)
            for table in keys
            for method in names
            if method in definition[table]["methods"]
        ]
        for one in pending:
            one.result()
    write_tables(definition)


if __name__ == "__main__":
    main()
