"""Collects finished runs into benchmarks/results/ and writes README's results table from what lies there.

python scripts/results.py outputs/maml-omniglot/<time> …     collect these runs, then write the table
python scripts/results.py                                    only write the table
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent
_RESULTS = _ROOT / "benchmarks/results"
_BEGIN, _END = "<!-- results: written by scripts/results.py -->", "<!-- end of results -->"


def collect(folder: Path) -> None:
    """One file for a run: its result, and every evaluation made of it since."""
    result = json.loads((folder / "result.json").read_text())
    evaluations = [json.loads(path.read_text()) for path in sorted((folder / "evaluations").glob("*.json"))]
    again = [found for found in evaluations if found["protocol_id"] != result["protocol_id"]]
    content = json.dumps({"result": result, "evaluations": again}, indent=1)
    _RESULTS.mkdir(parents=True, exist_ok=True)
    name = f"{result['name'].replace(' ', '-')}-{hashlib.sha256(result['command'].encode()).hexdigest()[:6]}"
    (_RESULTS / f"{name}.json").write_text(content + "\n")


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: one line a measurement, the run's own first."""
    lines = [
        "| method, data | way/shot/query | statistics | test | episodes | protocol | steps | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    commands = []
    for number, run in enumerate(runs, 1):
        result = run["result"]
        environment = result["environment"]
        versions = environment["versions"]
        commands.append(
            f"{number}. `{result['command']}`, seed {result['seed']}, commit {environment['commit']}, "
            f"{environment['hardware']}, torch {versions['torch']}"
        )
        for measured in [result, *sorted(run["evaluations"], key=_order)]:
            protocol = measured["protocol"]
            score, estimate = next(iter(measured["test"].items()))
            figure = (
                f"{100 * estimate['mean']:.2f} ± {100 * estimate['ci95']:.2f}%"
                if score == "accuracy"
                else f"{score} {estimate['mean']:.3f} ± {estimate['ci95']:.3f}"
            )
            own = measured is result
            cells = [
                f"{result['name']} ({number})",
                f"{protocol['way']}/{protocol['shot']}/{protocol['query']}",
                protocol["statistics"],
                figure,
                estimate["episodes"],
                measured["protocol_id"],
                result["steps"] if own else " ".join(measured["overrides"]),
                f"{result['seconds'] / 60:.0f}" if own else "",
            ]
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join([*lines, "", *commands])


def _order(measured: dict[str, Any]) -> tuple[Any, ...]:
    protocol = measured["protocol"]
    return protocol["way"], protocol["shot"], protocol["query"], protocol["statistics"]


def main() -> None:
    for folder in sys.argv[1:]:
        collect(Path(folder))
    runs = [json.loads(path.read_text()) for path in sorted(_RESULTS.glob("*.json"))]
    readme = _ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(_BEGIN)
    after = rest.split(_END)[1]
    readme.write_text(f"{before}{_BEGIN}\n{table(runs)}\n{_END}{after}")


if __name__ == "__main__":
    main()
