"""CSV files: one line per test episode, and other tables for programs."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metalearn.system.atomic import write_text
from metalearn.system.errors import UserError
from metalearn.system.reading import read_text


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file in UTF-8, atomically."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_scores(path: Path, metric: str, scores: Tensor) -> None:
    """Write one line per test episode. scores: [E]."""
    rows = ((index, f"{value:.6f}") for index, value in enumerate(scores.tolist()))
    write_csv(path, ("episode", metric), rows)


def read_scores(path: Path) -> Tensor:
    """Read the scores [E] that `write_scores` wrote, float64; raise UserError for another file."""
    lines = read_text(path).splitlines()[1:]
    try:
        scores = torch.tensor([float(line.split(",")[1]) for line in lines], dtype=torch.float64)
        is_valid = len(scores) > 1 and bool(scores.isfinite().all())
    except (ValueError, IndexError):
        is_valid = False
    if not is_valid:
        raise UserError(f"{path} is not a list of scores, at least two lines of episode,score")
    return scores
