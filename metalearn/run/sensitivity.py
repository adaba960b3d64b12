"""Compute what `metalearn plot` draws of a multirun folder."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console

from metalearn.report.console import print_line
from metalearn.report.folder import RunFolder
from metalearn.report.measurements import identity, runs_in
from metalearn.report.plots import draw_heat_map
from metalearn.system.atomic import make_writable
from metalearn.system.errors import UserError
from metalearn.system.reading import read_yaml

#: Settings that an error names.
_NAMED = 8


def plot_sweep(folder: Path, settings: list[str], console: Console) -> dict[str, Any]:
    """Draw validation scores of a multirun over two of its settings, as plots/sensitivity.png.

    `settings` are the names of two; [] for those that differ, if these are two. Return "files"; the
    "settings"; and "points": their values, the mean score, and number of runs. Raise UserError if
    there are no runs, or no two such settings.
    """
    finished, others = runs_in([folder])
    runs = [*finished, *(one for one in others if RunFolder(one).is_trained)]
    if not runs:
        raise UserError(f"{folder}: no finished run there or below")
    results = [RunFolder(one).read_result() for one in runs]
    own = [identity(read_yaml(RunFolder(one).config)) for one in runs]
    swept = [
        key
        for key in dict.fromkeys(key for one in own for key in one)
        if len({repr(one.get(key)) for one in own}) > 1
    ]
    if not set(settings) <= set(swept) or len(settings or swept) != 2:
        differing = ", ".join(swept[:_NAMED]) or "none"
        if len(swept) > _NAMED:
            differing += f" and {len(swept) - _NAMED} more"
        raise UserError(
            f"{folder}: a heat map takes two settings that differ between the runs; these differ: "
            f"{differing}; choose two with settings=a,b"
        )
    metric = results[0].metric
    if any(one.metric != metric for one in results):
        raise UserError(f"{folder}: its runs have different metrics")
    first, second = settings or swept
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    values: dict[str, dict[str, Any]] = {first: {}, second: {}}  # by their text
    for one, result in zip(own, results, strict=True):
        row, column = (json.dumps(one.get(key)).strip('"') for key in (first, second))
        values[first][row], values[second][column] = one.get(first), one.get(second)
        scores[row, column].append(result.validation_score)
    ticks = (_ordered(values[first]), _ordered(values[second]))
    means = {pair: sum(some) / len(some) for pair, some in scores.items()}
    path = RunFolder(folder).plots / "sensitivity.png"
    make_writable(path.parent)
    draw_heat_map(
        (first, second),
        ticks,
        [[means.get((row, column), math.nan) for column in ticks[1]] for row in ticks[0]],
        metric,
        results[0].higher_is_better,
        path,
        f"{results[0].name}, validation, {len(runs)} runs",
    )
    points = [
        {first: values[first][row], second: values[second][column], metric: mean,
         "runs": len(scores[row, column])}
        for (row, column), mean in means.items()
    ]  # fmt: skip
    print_line(console, f"validation {metric} of {len(runs)} runs over {first} and {second}")
    print_line(console, f"  {path}")
    return {"files": [str(path)], "settings": [first, second], "points": points}


def _ordered(values: dict[str, Any]) -> list[str]:
    """Return the texts of values, in the order of their numbers if all are numbers."""
    are_numbers = all(isinstance(one, int | float) for one in values.values())
    return sorted(values, key=values.__getitem__ if are_numbers else None)
