"""What a run leaves, and where two runs differ in it; for tests and benches of exact repetition and resume."""

import json
from pathlib import Path
from typing import Any

import torch

from metalearn.run import checkpoint


def left(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves, but for how long it took, and where and when it ran."""
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
            name: checkpoint.load(folder / "checkpoints" / name, torch.device("cpu"))
            for name in (checkpoint.BEST, checkpoint.LAST)
        },
    }


def difference(found: Any, expected: Any, where: str = "") -> str | None:
    """Where two trees of tensors and plain data are not equal bit for bit, or None."""
    if type(found) is not type(expected):
        return where or "type"
    if isinstance(found, dict) and found.keys() == expected.keys():
        parts = [(f"{where}.{key}", found[key], expected[key]) for key in found]
    elif isinstance(found, list | tuple) and len(found) == len(expected):
        parts = [
            (f"{where}[{place}]", *pair)
            for place, pair in enumerate(zip(found, expected, strict=True))
        ]
    else:
        equal = (
            torch.equal(found, expected) if isinstance(found, torch.Tensor) else found == expected
        )
        return None if equal else where or "value"
    return next(
        (place for name, *pair in parts if (place := difference(pair[0], pair[1], name))), None
    )
