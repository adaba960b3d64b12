"""Collect finished runs in benchmarks/results/; write the tables of docs/results.md and README.

python scripts/results.py outputs/maml-omniglot/<time> …    collect these runs, write the tables
python scripts/results.py --measured outputs/benchmark/quick/* …    also store the accuracies as the
                                                            reference values of the recipes
python scripts/results.py                                   only write the tables
"""

import hashlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from headlines import command_of, headlines, joined
from pages import ROOT, fill, wrap

from metalearn.config import gates
from metalearn.config.components import conf_dir
from metalearn.config.schema import BUDGETS
from metalearn.report import tables
from metalearn.report.stats import Difference, estimate
from metalearn.report.tables import format_interval, format_value

_RESULTS = ROOT / "benchmarks/results"

_ABOUT = """Gates: published results under the published test protocol, in order of value. A gate is
PASS if the mean over its seeds is at least the published mean minus its interval, minus 0.5 points
for accuracies, after training with `budget=day` or `budget=paper`; the interval of our own mean
plays no part. Results of smaller budgets have no verdict. Where the command has `run=`, the run of
that gate was tested, whose training is the same; its checkpoint was chosen by validation with the
classes and examples of that gate, and its hours count again. `here`: mean over seeds, with the mean
interval over test episodes; `over seeds`: the interval over seeds, if there are several. Hours are
of all seeds. `benchmarks/results/tests.jsonl` has a line for every test."""


def collect(folder: Path, measured: bool, experiment: str | None = None) -> None:
    """Write a run's result and its later evaluations, one file for each recipe it reproduces.

    Args:
        folder: Run folder.
        experiment: Only the recipe of this name; None for all, and for the run itself if it was not
            trained for one.
        measured: Also store the result in conf/measured.json, as the reference at this budget.
    """
    own = json.loads((folder / "result.json").read_text())
    recipes = [json.loads(path.read_text()) for path in sorted(folder.glob("reproduction*.json"))]
    evaluations = {
        str(path.relative_to(folder)): json.loads(path.read_text())
        for path in sorted((folder / "evaluations").glob("*.json"))
    }
    tests = {name: evaluations.pop(name) for recipe in recipes if (name := recipe.get("test"))}
    _RESULTS.mkdir(parents=True, exist_ok=True)
    others = [*evaluations.values()]
    if experiment is None and not (folder / "reproduction.json").exists():
        digest = hashlib.sha256(own["command"].encode()).hexdigest()[:6]
        _write(f"{own['name'].replace(' ', '-')}-{digest}", own, others)
    for recipe in recipes:
        name, budget = recipe["experiment"], recipe["budget"]
        if experiment not in (None, name):
            continue
        result, more = own, others
        if test := tests.get(recipe.get("test")):  # of a run that was trained for another gate
            result = {**own, **{key: test[key] for key in ("test", "protocol", "protocol_id")}}
            more = []
        log_tests(name, budget, [test or own, *more])
        _write(f"reproduce-{name}-{budget}-seed{own['seed']}", result, more, recipe)
        if measured:
            _store_reference(name, budget, result)


def _write(name: str, result: Any, evaluations: list[Any], recipe: Any = None) -> None:
    content = {"result": result, "evaluations": evaluations}
    if recipe is not None:
        content["reproduction"] = recipe
    (_RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def log_tests(experiment: str, budget: str, tests: list[dict[str, Any]]) -> None:
    """Append a line to tests.jsonl for each test of a gate that it does not have yet."""
    file = _RESULTS / "tests.jsonl"
    known = file.read_text().splitlines() if file.exists() else []
    with file.open("a") as stream:
        for test in tests:
            if test.get("split", "test") != "test":
                continue
            line = json.dumps(
                {
                    "experiment": experiment, "budget": budget, "seed": test["seed"],
                    "test": test["test"], "protocol_id": test["protocol_id"],
                    "changes": test.get("overrides", []), "seconds": test["seconds"],
                    "commit": test["environment"]["commit"],
                }
            )  # fmt: skip
            if line not in known:
                stream.write(line + "\n")


def _store_reference(experiment: str, budget: str, result: dict[str, Any]) -> None:
    """Write a measured result to conf/measured.json."""
    path = conf_dir() / "measured.json"
    content = json.loads(path.read_text())
    ((_, score),) = result["test"].items()
    content.setdefault(experiment, {})[budget] = {
        "mean": round(score["mean"], 4),
        "ci95": round(score["ci95"], 4),
        "minutes": round(result["seconds"] / 60, 1),
        "hardware": result["environment"]["hardware"],
        "commit": result["environment"]["commit"],
        "seed": result["seed"],
        "protocol_id": result["protocol_id"],
        "sampler": result["protocol"]["sampler"],
    }
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def _score(test: dict[str, Any]) -> str:
    metric, score = next(iter(test["test"].items()))
    return format_interval(metric, score["mean"], score["ci95"])


def plain(runs: list[dict[str, Any]]) -> list[str]:
    """Return a table of plain commands, one row per test, followed by the commands."""
    rows, commands = [], []
    for number, run in enumerate(runs, 1):
        result = run["result"]
        environment = result["environment"]
        commands.append(
            f"{number}. `{result['command']}`, seed {result['seed']}, "
            f"commit {environment['commit']}, {environment['hardware']}, "
            f"torch {environment['versions']['torch']}"
        )
        tests = [one for one in run["evaluations"] if one.get("split", "test") == "test"]
        same = [
            one
            for one in run["evaluations"]
            if one["protocol_id"] == result["protocol_id"] and not _adaptation(one)
        ]
        others = [one for one in tests if one not in same]
        for test in [result, *sorted(others, key=_order)]:
            is_own = test is result
            paired = next(iter(same), {}) if is_own else test
            difference = paired.get("transductive_minus_inductive")
            is_inductive = test["protocol"]["statistics"] != "query"
            rows.append(
                {
                    "method, data": f"{result['name']} ({number})",
                    "way/shot/query": "{way}/{shot}/{query}".format(**test["protocol"]),
                    "statistics": test["protocol"]["statistics"],
                    "test": _score(test),
                    "transductive minus inductive": tables.format_difference(
                        next(iter(test["test"])), Difference(**difference)
                    )
                    if difference and is_inductive
                    else "",
                    "protocol": test["protocol_id"],
                    "adaptation": " ".join(_adaptation(test)),
                    "steps": result["steps"] if is_own else "",
                    "minutes": f"{result['seconds'] / 60:.0f}" if is_own else "",
                }
            )
    return [*tables.markdown_table(rows), "", *wrap(commands)]


def _adaptation(test: dict[str, Any]) -> list[str]:
    return [key for key in test.get("overrides", []) if key.startswith("algo.")]


def _order(test: dict[str, Any]) -> tuple[Any, ...]:
    protocol = test["protocol"]
    shape = (protocol[key] for key in ("way", "shot", "query", "statistics"))
    return *shape, _adaptation(test)


def gate_rows(runs: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return a row per gate: its runs at the largest budget, all seeds, and the verdict.

    `runs` are the contents of the result files that have a `reproduction`.
    """
    rows = []
    for name, gate in gates.gates().items():
        own = [run for run in runs if run["reproduction"]["experiment"] == name]
        budget = max((run["reproduction"]["budget"] for run in own), key=BUDGETS.index, default="")
        own = [run for run in own if run["reproduction"]["budget"] == budget]
        results = [run["result"] for run in own]
        estimates = [result["test"][gate.metric] for result in results]
        is_full = budget in ("day", "paper")
        mean, verdict = None, "not run"
        if estimates:
            mean = statistics.fmean(one["mean"] for one in estimates)
        if mean is not None and is_full:
            verdict = "PASS" if gate.is_passed(mean) else "FAIL"
        width = statistics.fmean(one["ci95"] for one in estimates) if estimates else 0.0
        seeds = torch.tensor([one["mean"] for one in estimates], dtype=torch.float64)
        rows.append(
            {
                "gate": f"`{name}`",
                "published": _interval(gate.metric, gate.mean, gate.ci95),
                "here": "" if mean is None else _interval(gate.metric, mean, width),
                "over seeds": f"± {format_value(gate.metric, estimate(seeds).ci95)}"
                if len(seeds) > 1
                else "",
                "verdict": verdict,
                "budget": budget,
                "seeds": ", ".join(str(result["seed"]) for result in results),
                "test episodes": joined(f"{one['episodes']:,}" for one in estimates),
                "hours": f"{sum(one['seconds'] for one in results) / 3600:.2f}" if results else "",
                "protocol": joined(result["protocol_id"] for result in results),
                "sampler": joined(result["protocol"].get("sampler", 1) for result in results),
                "commit": joined(result["environment"]["commit"] for result in results),
                "command": f"`{command_of(name, budget or 'day', own)}`",
            }
        )
    return rows


def _interval(metric: str, mean: float, ci95: float) -> str:
    return format_interval(metric, mean, ci95) if ci95 else format_value(metric, mean)


def write_tables() -> list[str]:
    """Write the tables of docs/results.md and README; return the one of the recipes."""
    runs = [json.loads(path.read_text()) for path in sorted(_RESULTS.glob("*.json"))]
    recipes = [run for run in runs if "reproduction" in run]
    reproduced = tables.markdown_table(gate_rows(recipes))
    lines = [
        *wrap([_ABOUT.replace("\n", " ")]),
        "",
        *reproduced,
        "",
        "Plain commands, with settings for a CPU, tested with several protocols:",
        "",
        *plain([run for run in runs if "reproduction" not in run]),
    ]
    fill(ROOT / "docs/results.md", "results: written by scripts/results.py", lines)
    fill(ROOT / "README.md", "headlines: written by scripts/results.py", headlines(recipes))
    return reproduced


def main() -> None:
    """Collect the given run folders and write the tables."""
    args = sys.argv[1:]
    for folder in [arg for arg in args if arg != "--measured"]:
        collect(Path(folder), measured="--measured" in args)
    write_tables()


if __name__ == "__main__":
    main()
