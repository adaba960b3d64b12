"""The table of README: for each headline, the runs that trained longest."""

import json
from collections.abc import Iterable
from typing import Any

import torch
import yaml
from pages import ROOT

from metalearn.config import gates
from metalearn.report import tables
from metalearn.report.stats import estimate

_METHODS = ROOT / "benchmarks/methods"
#: Rows of the table in README: names of benchmarks/methods.yaml. The gate `<method>_<table>`
#: replaces a row if its runs took longer.
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


def headlines(runs: list[dict[str, Any]]) -> list[str]:
    """Return the table of README: for each headline, the runs of recipes that trained longest."""
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
                by_budget.setdefault(run["reproduction"]["budget"], []).append(run)
        for budget, group in by_budget.items():
            results = [run["result"] for run in group]
            gate = gates.gates()[f"{method}_{table}"]
            sources.append(
                (
                    command_of(f"{method}_{table}", budget, group),
                    [one["test"]["accuracy"] for one in results],
                    results,
                    f"{100 * gate.mean:.1f}, {gate.source}",
                )
            )
        command, tests, results, published = max(
            sources, key=lambda source: max(one["seconds"] for one in source[2])
        )
        mean = torch.tensor([one["mean"] for one in tests], dtype=torch.float64)
        interval = estimate(mean).ci95 if len(mean) > 1 else tests[0]["ci95"]
        minutes = sum(one["seconds"] for one in results) / len(results) / 60
        words = results[0]["command"].split()
        shown = command or " ".join(word for word in words if not word.startswith(_SILENT))
        rows.append(
            {
                "method": f"`{method}`",
                "test": definition[table]["title"].rpartition(",")[0],
                "here": f"{100 * float(mean.mean()):.1f} ± {100 * interval:.1f}",
                "published": published,
                "seeds": len(mean),
                "minutes": f"{minutes:.0f}",
                "command": f"`{shown}`",
            }
        )
    return tables.markdown_table(rows)


def command_of(gate: str, budget: str, runs: list[dict[str, Any]]) -> str:
    """Return the command of a gate; with the gate whose run was tested, if that was another's."""
    others = joined(own for run in runs if (own := run["reproduction"].get("run")))
    return f"metalearn reproduce {gate} budget={budget}" + (others and f" run=<{others}>")


def joined(values: Iterable[Any]) -> str:
    """Return the different values, in order."""
    return ", ".join(sorted(set(map(str, values))))
