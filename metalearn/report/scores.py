"""CSV files: one line per test episode, and other tables for programs."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metalearn.system.errors import UserError


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file in UTF-8."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_scores(path: Path, metric: str, scores: Tensor) -> None:
    """Write one line per test episode. scores: [E]."""
    rows = ((index, f"{value:.6f}") for index, value in enumerate(scores.tolist()))
    write_csv(path, ("episode", metric), rows)


def read_scores(path: Path) -> Tensor:
    """Read the scores [E] that `write_scores` wrote, float64.

    Raises:
        UserError: If the file is missing or foreign.
    """
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            values = [float(row[1]) for row in list(csv.reader(stream))[1:]]
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path} is not a list of scores ({error})") from None
    return torch.tensor(values, dtype=torch.float64)
