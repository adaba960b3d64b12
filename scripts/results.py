"""Collects finished runs into benchmarks/results/ and writes the tables of docs/results.md from what lies there.

python scripts/results.py outputs/maml-omniglot/<time> …       collect these runs, then write the tables
python scripts/results.py --measured outputs/benchmark/quick/* …    besides, what recipes are held against from now on
python scripts/results.py                                      only write the tables
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from pages import ROOT, fill

from metalearn.config import checking, composition
from metalearn.report import tables
from metalearn.report.tables import shown_interval

_RESULTS = ROOT / "benchmarks/results"
_BUDGETS = ("smoke", "quick", "paper")


def collect(folder: Path, measured: bool) -> None:
    """One file for a run: its result, every evaluation made of it since, and what it reproduces.

    Args: measured: whether the experiment's file takes the figure as the one to hold against at this budget.
    """
    result = json.loads((folder / "result.json").read_text())
    evaluations = [
        json.loads(path.read_text()) for path in sorted((folder / "evaluations").glob("*.json"))
    ]
    content: dict[str, Any] = {"result": result, "evaluations": evaluations}
    name = f"{result['name'].replace(' ', '-')}-{hashlib.sha256(result['command'].encode()).hexdigest()[:6]}"
    if (folder / "reproduction.json").exists():
        found = json.loads((folder / "reproduction.json").read_text())
        content["reproduction"] = found
        name = f"reproduce-{found['experiment']}-{found['budget']}-seed{result['seed']}"
        if measured:
            _hold_against(found["experiment"], found["budget"], result)
    _RESULTS.mkdir(parents=True, exist_ok=True)
    (_RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def _hold_against(experiment: str, budget: str, result: dict[str, Any]) -> None:
    """Writes a measured figure into the header of the experiment's file."""
    path = composition.conf_dir() / "experiment" / f"{experiment}.yaml"
    before, mark, _ = path.read_text().partition("  measured:")
    settings = checking.checked(composition.composed([f"experiment={experiment}"])).reproduction
    assert mark and settings is not None
    estimate = result["test"]["accuracy"]
    lines = {name: _line(name, vars(one)) for name, one in settings.measured.items()}
    lines[budget] = _line(
        budget,
        {
            "mean": round(estimate["mean"], 4),
            "ci95": round(estimate["ci95"], 4),
            "minutes": round(result["seconds"] / 60, 1),
            "hardware": result["environment"]["hardware"],
            "commit": result["environment"]["commit"],
            "seed": result["seed"],
            "protocol_id": result["protocol_id"],
            "sampler": result["protocol"]["sampler"],
        },
    )
    path.write_text(
        "\n".join([f"{before}{mark}", *(lines[name] for name in _BUDGETS if name in lines), ""])
    )


def _line(budget: str, figures: dict[str, Any]) -> str:
    return f"    {budget}: {{{', '.join(f'{key}: {json.dumps(value)}' for key, value in figures.items())}}}"


def _figure(measured: dict[str, Any]) -> str:
    score, estimate = next(iter(measured["test"].items()))
    return shown_interval(score, estimate["mean"], estimate["ci95"])


def _shape(protocol: dict[str, Any]) -> str:
    return f"{protocol['way']}/{protocol['shot']}/{protocol['query']}"


def plain(runs: list[dict[str, Any]]) -> list[str]:
    """Plain commands: one line a measurement, the run's own first; then the commands."""
    rows, commands = [], []
    for number, run in enumerate(runs, 1):
        result = run["result"]
        environment = result["environment"]
        commands.append(
            f"{number}. `{result['command']}`, seed {result['seed']}, commit {environment['commit']}, "
            f"{environment['hardware']}, torch {environment['versions']['torch']}"
        )
        tests = [one for one in run["evaluations"] if one.get("split", "test") == "test"]
        others = [
            one for one in tests if one["protocol_id"] != result["protocol_id"] or _method(one)
        ]
        same = [
            one
            for one in run["evaluations"]
            if one["protocol_id"] == result["protocol_id"] and not _method(one)
        ]
        for measured in [result, *sorted(others, key=_order)]:
            own = measured is result
            paired = next(iter(same), {}) if own else measured
            difference = paired.get("transductive_minus_inductive")
            inductive = measured["protocol"]["statistics"] != "query"
            rows.append(
                [
                    f"{result['name']} ({number})",
                    _shape(measured["protocol"]),
                    measured["protocol"]["statistics"],
                    _figure(measured),
                    tables.shown_difference(next(iter(measured["test"])), difference)
                    if difference and inductive
                    else "",
                    measured["protocol_id"],
                    " ".join(_method(measured)),
                    result["steps"] if own else "",
                    f"{result['seconds'] / 60:.0f}" if own else "",
                ]
            )
    head = ["method, data", "way/shot/query", "statistics", "test", "transductive minus it", "protocol", "adaptation",
            "steps", "minutes"]  # fmt: skip
    return [
        *tables.markdown_table([dict(zip(head, row, strict=True)) for row in rows]),
        "",
        *commands,
    ]


def _method(measured: dict[str, Any]) -> list[str]:
    return [word for word in measured.get("overrides", []) if word.startswith("algo.")]


def _order(measured: dict[str, Any]) -> tuple[Any, ...]:
    protocol = measured["protocol"]
    return (
        protocol["way"],
        protocol["shot"],
        protocol["query"],
        protocol["statistics"],
        _method(measured),
    )


def recipes(runs: list[dict[str, Any]]) -> list[str]:
    """Published figures beside what the recipe gave at the largest budget it was run with."""
    best: dict[str, dict[str, Any]] = {}
    for run in sorted(runs, key=lambda run: _BUDGETS.index(run["reproduction"]["budget"])):
        best[run["reproduction"]["experiment"]] = run
    rows, hardware = [], set()
    for name, run in sorted(best.items()):
        result = run["result"]
        settings = checking.checked(composition.composed([f"experiment={name}"])).reproduction
        assert settings is not None
        published = settings.published
        interval = f" ± {100 * published.ci95:.2f}" if published.ci95 else ""
        environment = result["environment"]
        hardware.add(f"{environment['hardware']}, torch {environment['versions']['torch']}")
        rows.append(
            [
                f"`{name}`",
                f"{100 * published.mean:.2f}{interval}%",
                _figure(result),
                run["reproduction"]["budget"],
                _shape(result["protocol"]),
                result["protocol"]["statistics"],
                result["protocol_id"],
                result["protocol"].get("sampler", 1),
                result["seed"],
                f"{result['seconds'] / 60:.0f}",
                environment["commit"],
            ]
        )
    head = ["experiment", "published", "here", "budget", "way/shot/query", "statistics", "protocol", "sampler", "seed", "minutes",
            "commit"]  # fmt: skip
    return (
        [
            *tables.markdown_table([dict(zip(head, row, strict=True)) for row in rows]),
            "",
            f"On {'; '.join(sorted(hardware))}.",
        ]
        if rows
        else []
    )


def write_tables() -> list[str]:
    """Writes both tables into docs/results.md. Returns: the one of the recipes."""
    runs = [json.loads(path.read_text()) for path in sorted(_RESULTS.glob("*.json"))]
    reproduced = recipes([run for run in runs if "reproduction" in run])
    own = plain([run for run in runs if "reproduction" not in run])
    lines = [
        "Recipes of published figures, under the published protocol, at the largest budget they were run with",
        "(`metalearn reproduce <experiment> budget=…`):",
        "",
        *reproduced,
        "",
        "Plain commands, whose settings suit a CPU, tested under several protocols:",
        "",
        *own,
    ]
    fill(ROOT / "docs/results.md", "results: written by scripts/results.py", lines)
    return reproduced


def main() -> None:
    words = sys.argv[1:]
    for folder in [word for word in words if word != "--measured"]:
        collect(Path(folder), measured="--measured" in words)
    write_tables()


if __name__ == "__main__":
    main()
