"""Collect finished runs in benchmarks/results/; write the tables of docs/results.md and README.

python scripts/results.py outputs/maml-omniglot/<time> …    collect these runs, write the tables
python scripts/results.py --measured outputs/benchmark/quick/* …    also store the accuracies as the
                                                            reference values of the recipes
python scripts/results.py                                   only write the tables
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from pages import ROOT, fill, wrap

from metalearn.config import checking, composition
from metalearn.report import stats, tables
from metalearn.report.stats import Difference
from metalearn.report.tables import format_interval

_RESULTS = ROOT / "benchmarks/results"
_BUDGETS = ("smoke", "quick", "paper")
_METHODS = ROOT / "benchmarks/methods"
#: Rows of the table in README: names of benchmarks/methods.yaml. The experiment
#: `<method>_<table>` replaces a row if its runs took longer.
_HEADLINES = [
    *(("omniglot_5w1s", method) for method in ("maml", "protonet")),
    *(
        (table, method)
        for table in ("cifar_fs_5w1s", "cifar_fs_5w5s")
        for method in ("maml", "protonet", "r2d2", "rfs")
    ),
]
#: Settings that change no number, left out of the commands in README.
_SILENT = ("logger=", "resume=", "engine.threads=", "checkpoint.every=", "data_dir=")


def collect(folder: Path, measured: bool) -> None:
    """Write one file for a run: its result, its later evaluations, and the recipe it reproduces.

    Args:
        folder: Run folder.
        measured: Also store the accuracy in the experiment's file, as the reference at this budget.
    """
    result = json.loads((folder / "result.json").read_text())
    evaluations = [
        json.loads(path.read_text()) for path in sorted((folder / "evaluations").glob("*.json"))
    ]
    content: dict[str, Any] = {"result": result, "evaluations": evaluations}
    digest = hashlib.sha256(result["command"].encode()).hexdigest()[:6]
    name = f"{result['name'].replace(' ', '-')}-{digest}"
    if (folder / "reproduction.json").exists():
        recipe = json.loads((folder / "reproduction.json").read_text())
        content["reproduction"] = recipe
        name = f"reproduce-{recipe['experiment']}-{recipe['budget']}-seed{result['seed']}"
        if measured:
            _store_reference(recipe["experiment"], recipe["budget"], result)
    _RESULTS.mkdir(parents=True, exist_ok=True)
    (_RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def _store_reference(experiment: str, budget: str, result: dict[str, Any]) -> None:
    """Write a measured accuracy to `reproduction.measured` in the experiment's file."""
    path = composition.conf_dir() / "experiment" / f"{experiment}.yaml"
    before, mark, _ = path.read_text().partition("  measured:")
    settings = checking.check_config(
        composition.compose_config([f"experiment={experiment}"])
    ).reproduction
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


def _line(budget: str, values: dict[str, Any]) -> str:
    content = ", ".join(f"{key}: {json.dumps(value)}" for key, value in values.items())
    return f"    {budget}: {{{content}}}"


def _score(test: dict[str, Any]) -> str:
    score, estimate = next(iter(test["test"].items()))
    return format_interval(score, estimate["mean"], estimate["ci95"])


def _shape(protocol: dict[str, Any]) -> str:
    return f"{protocol['way']}/{protocol['shot']}/{protocol['query']}"


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
        others = [
            one for one in tests if one["protocol_id"] != result["protocol_id"] or _adaptation(one)
        ]
        same = [
            one
            for one in run["evaluations"]
            if one["protocol_id"] == result["protocol_id"] and not _adaptation(one)
        ]
        for test in [result, *sorted(others, key=_order)]:
            is_own = test is result
            paired = next(iter(same), {}) if is_own else test
            difference = paired.get("transductive_minus_inductive")
            is_inductive = test["protocol"]["statistics"] != "query"
            rows.append(
                [
                    f"{result['name']} ({number})",
                    _shape(test["protocol"]),
                    test["protocol"]["statistics"],
                    _score(test),
                    tables.format_difference(next(iter(test["test"])), Difference(**difference))
                    if difference and is_inductive
                    else "",
                    test["protocol_id"],
                    " ".join(_adaptation(test)),
                    result["steps"] if is_own else "",
                    f"{result['seconds'] / 60:.0f}" if is_own else "",
                ]
            )
    head = ["method, data", "way/shot/query", "statistics", "test", "transductive minus inductive",
            "protocol", "adaptation", "steps", "minutes"]  # fmt: skip
    return [
        *tables.markdown_table([dict(zip(head, row, strict=True)) for row in rows]),
        "",
        *wrap(commands),
    ]


def _adaptation(test: dict[str, Any]) -> list[str]:
    return [key for key in test.get("overrides", []) if key.startswith("algo.")]


def _order(test: dict[str, Any]) -> tuple[Any, ...]:
    protocol = test["protocol"]
    return (
        protocol["way"],
        protocol["shot"],
        protocol["query"],
        protocol["statistics"],
        _adaptation(test),
    )


def recipes(runs: list[dict[str, Any]]) -> list[str]:
    """Return a table of published results and the recipe's own at the largest budget it was run."""
    best: dict[str, dict[str, Any]] = {}
    for run in sorted(runs, key=lambda run: _BUDGETS.index(run["reproduction"]["budget"])):
        best[run["reproduction"]["experiment"]] = run
    rows, hardware = [], set()
    for name, run in sorted(best.items()):
        result = run["result"]
        settings = checking.check_config(
            composition.compose_config([f"experiment={name}"])
        ).reproduction
        assert settings is not None
        published = settings.published
        interval = f" ± {100 * published.ci95:.2f}" if published.ci95 else ""
        environment = result["environment"]
        hardware.add(f"{environment['hardware']}, torch {environment['versions']['torch']}")
        rows.append(
            [
                f"`{name}`",
                f"{100 * published.mean:.2f}{interval}%",
                _score(result),
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
    head = ["experiment", "published", "measured", "budget", "way/shot/query", "statistics",
            "protocol", "sampler", "seed", "minutes", "commit"]  # fmt: skip
    return (
        [
            *tables.markdown_table([dict(zip(head, row, strict=True)) for row in rows]),
            "",
            f"On {'; '.join(sorted(hardware))}.",
        ]
        if rows
        else []
    )


def headlines(runs: list[dict[str, Any]]) -> list[str]:
    """Return the table of README: for each headline, the runs that trained longest.

    Args:
        runs: Runs of recipes, as `collect` stored them.
    """
    definition = yaml.safe_load(_METHODS.with_suffix(".yaml").read_text())
    rows = []
    for table, method in _HEADLINES:
        stored = json.loads((_METHODS / table / f"{method}.json").read_text())
        own = definition[table]["methods"][method]["published"]
        test = (stored["as_published"] or stored["result"])["test"]["accuracy"]
        # Runs of one source: command, accuracies, results of all seeds, published result.
        sources: list[tuple[str | None, list[Any], list[Any], str]] = [
            (None, [test], [stored["result"]], f"{100 * own['mean']:.1f}, {own['source']}")
        ]
        by_budget: dict[str, list[dict[str, Any]]] = {}
        for run in runs:
            if run["reproduction"]["experiment"] == f"{method}_{table}":
                by_budget.setdefault(run["reproduction"]["budget"], []).append(run["result"])
        for budget, results in by_budget.items():
            settings = checking.check_config(
                composition.compose_config([f"experiment={method}_{table}"])
            ).reproduction
            assert settings is not None
            sources.append(
                (
                    f"metalearn reproduce {method}_{table} budget={budget}",
                    [one["test"]["accuracy"] for one in results],
                    results,
                    f"{100 * settings.published.mean:.1f}, {settings.published.source}",
                )
            )
        command, tests, results, published = max(
            sources, key=lambda source: max(one["seconds"] for one in source[2])
        )
        mean = torch.tensor([one["mean"] for one in tests], dtype=torch.float64)
        interval = stats.estimate(mean).ci95 if len(mean) > 1 else tests[0]["ci95"]
        minutes = sum(one["seconds"] for one in results) / len(results) / 60
        words = results[0]["command"].split()
        shown = command or " ".join(word for word in words if not word.startswith(_SILENT))
        rows.append(
            {
                "": definition[table]["title"].rpartition(",")[0],
                "here": f"{100 * float(mean.mean()):.1f} ± {100 * interval:.1f}",
                "published": published,
                "seeds": len(mean),
                "minutes": f"{minutes:.0f}",
                "command": f"`{shown}`",
            }
        )
    return tables.markdown_table(rows)


def write_tables() -> list[str]:
    """Write the tables of docs/results.md and README; return the one of the recipes."""
    runs = [json.loads(path.read_text()) for path in sorted(_RESULTS.glob("*.json"))]
    reproduced = recipes([run for run in runs if "reproduction" in run])
    own = plain([run for run in runs if "reproduction" not in run])
    lines = [
        "Recipes of published results (`metalearn reproduce <experiment> budget=…`), with the",
        "published protocol, at the largest budget that was run:",
        "",
        *reproduced,
        "",
        "Plain commands, with settings for a CPU, tested with several protocols:",
        "",
        *own,
    ]
    fill(ROOT / "docs/results.md", "results: written by scripts/results.py", lines)
    rows = headlines([run for run in runs if "reproduction" in run])
    fill(ROOT / "README.md", "headlines: written by scripts/results.py", rows)
    return reproduced


def main() -> None:
    """Collect the given run folders and write the tables."""
    args = sys.argv[1:]
    for folder in [arg for arg in args if arg != "--measured"]:
        collect(Path(folder), measured="--measured" in args)
    write_tables()


if __name__ == "__main__":
    main()
