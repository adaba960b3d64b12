"""Trains and tests every method that benchmarks/methods.yaml names, and writes the tables of methods.

python scripts/benchmark_methods.py [only=omniglot_5w1s] [methods=maml,protonet] [jobs=2] [key=value …]

Each run lies in outputs/benchmark/methods/<table>/<method>/, and beside it, in …-untrained/, a test of the same method before any
training. What is done under the same settings is skipped; a run that was cut off is gone on with. Figures go to
benchmarks/methods/<table>/<method>.json, the tables into README and docs/algorithms/, the curves to docs/figures/. `jobs` runs go side by side, one
thread each. Without a key, `only=none` writes the tables from what lies in benchmarks/methods/.
"""

import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from benchmark import make_room
from pages import ROOT, fill

from metalearn import composition, report
from metalearn.figures import draw_lines, shown_interval
from metalearn.verbs.train import RESULT_FILE

_RESULTS = ROOT / "benchmarks/methods"
_RUNS = Path("outputs/benchmark/methods")
#: Points by which a method may be below its published figure without being named.
_SHORT = 0.01


def run(folder: Path, overrides: list[str], more: list[str]) -> dict[str, Any]:
    """The result of a run in this folder, made unless it is there already."""
    make_room(folder, [*overrides, *more])
    if not (folder / RESULT_FILE).exists():
        command = [
            sys.executable,
            "-m",
            "metalearn",
            "train",
            *overrides,
            "logger=none",
            "resume=auto",
            *more,
        ]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".log").open("a") as log:
            subprocess.run(
                [*command, f"hydra.run.dir={folder}"], check=True, stdout=log, stderr=log
            )
    found: dict[str, Any] = json.loads((folder / RESULT_FILE).read_text())
    return found


def with_queries(folder: Path, query: int) -> dict[str, Any]:
    """The test of the same weights with another number of queries a class."""
    command = [
        sys.executable,
        "-m",
        "metalearn",
        "evaluate",
        f"run={folder}",
        f"episode.query={query}",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    own = json.loads((folder / RESULT_FILE).read_text())["protocol"]
    found = [json.loads(path.read_text()) for path in (folder / "evaluations").glob("*.json")]
    return next(one for one in found if one["protocol"] == own | {"query": query})


def measure(table: str, method: str, wanted: dict[str, Any], more: list[str]) -> None:
    """Trains and tests one method of one table, and keeps the figures."""
    print(f"{table}: {method}", flush=True)
    one = wanted["methods"][method]
    folder, overrides = (
        _RUNS / table / method,
        [f"algo={method}", *wanted["settings"], *one["settings"]],
    )
    untrained = run(folder.with_name(f"{method}-untrained"), [*overrides, "train.steps=0"], more)
    result = run(folder, overrides, more)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    content = {
        "result": result,
        "untrained": untrained["test"],
        "as_published": with_queries(folder, one["published"]["query"]) if "query" in one.get("published", {}) else None,
        "tasks_per_second": statistics.median(row["tasks_per_second"] for row in rows),
        "curve": [{name: row[name] for name in row if name == "step" or name.startswith("val.")} for row in rows if "val.accuracy" in row],
    }  # fmt: skip
    (_RESULTS / table).mkdir(parents=True, exist_ok=True)
    report.write_json(_RESULTS / table / f"{method}.json", content)
    print(f"{table}: {method} {_figure(result['test'])}", flush=True)


def _figure(test: dict[str, Any]) -> str:
    score, estimate = next(iter(test.items()))
    return shown_interval(score, estimate["mean"], estimate["ci95"])


def _row(method: str, found: dict[str, Any], published: dict[str, Any] | None) -> dict[str, Any]:
    result, as_published = found["result"], found["as_published"]
    held = (as_published or result)["test"]["accuracy"]["mean"]
    short = published and held < published["mean"] - _SHORT
    return {
        "`algo=`": f"`{method}`",
        "test": _figure(result["test"]),
        "with 1 query": _figure(as_published["test"]) if as_published else "",
        "published": f"{100 * published['mean']:.1f} ({published['source']})" if published else "",
        "points short": f"{100 * (published['mean'] - held):.1f}" if published and short else "",
        "untrained": f"{100 * found['untrained']['accuracy']['mean']:.1f}%",
        "statistics": result["protocol"]["statistics"],
        "steps": result["steps"],
        "best step": result["best_step"],
        "tasks/s": f"{found['tasks_per_second']:.1f}",
        "minutes": f"{result['seconds'] / 60:.0f}",
        "commit": result["environment"]["commit"],
    }


def write_tables(definition: dict[str, Any]) -> None:
    """Writes the tables into README and the pages of the methods, and draws the curves of validation."""
    families = composition.families()
    order = [method for family in families.values() for method in family]
    lines: list[str] = []
    pages: dict[str, list[dict[str, Any]]] = {method: [] for method in order}
    for table, wanted in definition.items():
        stored = {
            path.stem: json.loads(path.read_text()) for path in (_RESULTS / table).glob("*.json")
        }
        found = {method: stored[method] for method in order if method in stored}
        if not found:
            continue
        rows = {m: _row(m, one, wanted["methods"][m].get("published")) for m, one in found.items()}
        for method, row in rows.items():
            pages[method].append(
                {"data": wanted["title"]} | {name: row[name] for name in list(row)[1:]}
            )
        lines += [_heading(wanted["title"], [one["result"] for one in found.values()]), ""]
        lines += [*report.markdown_table(list(rows.values())), ""]
        for family, methods in families.items():
            curves = {
                method: [
                    (row["step"], row["val.accuracy"], row["val.accuracy_ci95"])
                    for row in found[method]["curve"]
                ]
                for method in methods
                if method in found
            }
            if curves:
                path = ROOT / f"docs/figures/{table}_{family}.png"
                draw_lines(curves, "meta-training step", "validation accuracy", path)
    fill(ROOT / "README.md", "methods: written by scripts/benchmark_methods.py", lines)
    for method, entries in pages.items():
        page = ROOT / f"docs/algorithms/{method}.md"
        fill(
            page,
            "figures",
            report.markdown_table(entries)
            if entries
            else [
                "Not trained for the table of methods yet; [results](../results.md) may have other runs."
            ],
        )


def _heading(title: str, results: list[dict[str, Any]]) -> str:
    """What all rows of a table share."""
    protocol = results[0]["protocol"]
    machines = {
        f"{one['environment']['hardware']}, torch {one['environment']['versions']['torch']}"
        for one in results
    }
    return (
        f"{title} ({protocol['episodes']} test episodes, {protocol['query']} queries a class, seed {results[0]['seed']}; "
        f"{'; '.join(sorted(machines))}):"
    )


def _chosen(key: str, given: str, known: list[str]) -> list[str]:
    """The names of a comma-separated list, all where it is empty."""
    names = given.split(",") if given else known
    for name in names:
        if name not in known:
            sys.exit(f"{key}={name}: there are {', '.join(known)}")
    return names


def main() -> None:
    definition = yaml.safe_load((_RESULTS.with_suffix(".yaml")).read_text())
    given = dict(word.partition("=")[::2] for word in sys.argv[1:])
    only, methods, jobs = (
        given.pop("only", ""),
        given.pop("methods", ""),
        int(given.pop("jobs", "1")),
    )
    more = [
        f"{key}={value}"
        for key, value in (({"engine.threads": "1"} if jobs > 1 else {}) | given).items()
    ]
    tables = [] if only == "none" else _chosen("only", only, list(definition))
    known = {name: None for table in tables or definition for name in definition[table]["methods"]}
    names = _chosen("methods", methods, list(known))
    with ThreadPoolExecutor(jobs) as pool:
        pending = [
            pool.submit(measure, table, method, definition[table], more)
            for table in tables
            for method in names
            if method in definition[table]["methods"]
        ]
        for one in pending:
            one.result()
    write_tables(definition)


if __name__ == "__main__":
    main()
