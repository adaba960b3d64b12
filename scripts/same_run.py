"""Compare the output of two runs, for tests and benchmarks of exact repetition and resume."""

import json
from pathlib import Path
from typing import Any

import torch

from metalearn.report.folder import RunFolder
from metalearn.run import checkpoint


def left(folder: Path) -> dict[str, Any]:
    """Return the output of a finished run, without its duration, command and environment."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    return {
        "rows": [
            {name: row[name] for name in row if name not in ("tasks_per_second", "seconds")}
            for row in rows
        ],
        "result": {
            name: result[name]
            for name in result
            if name not in ("seconds", "command", "environment")
        },
        **{name: (folder / name).read_text() for name in ("test_scores.csv", "test_classes.csv")},
        **{
            path.name: checkpoint.load(path, torch.device("cpu"))
            for path in (RunFolder(folder).best, RunFolder(folder).last)
        },
    }


def difference(actual: Any, expected: Any, where: str = "") -> str | None:
    """Return where two trees of tensors and plain data are not bit-for-bit equal, or None."""
    if type(actual) is not type(expected):
        return where or "type"
    if isinstance(actual, dict) and actual.keys() == expected.keys():
        parts = [(f"{where}.{key}", actual[key], expected[key]) for key in actual]
    elif isinstance(actual, list | tuple) and len(actual) == len(expected):
        parts = [
            (f"{where}[{index}]", *pair)
            for index, pair in enumerate(zip(actual, expected, strict=True))
        ]
    elif isinstance(actual, torch.Tensor):
        return None if torch.equal(actual, expected) else where or "value"
    else:
        return None if actual == expected else where or "value"
    return next((at for name, *pair in parts if (at := difference(pair[0], pair[1], name))), None)
