"""Plot scores as PNG files."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metalearn.system.atomic import atomic_writer

#: Longest label that is drawn, in characters.
_LABEL_LENGTH = 60


@contextlib.contextmanager
def new_figure(path: Path, width: float = 6.4, height: float = 4.0) -> Iterator[Any]:
    """Yield an empty figure (sizes in inches); afterwards write it to a PNG file."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Names of runs may contain a dollar sign, and letters that the font lacks.
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with atomic_writer(path) as stream:
            # Matplotlib draws at most 65,535 pixels.
            figure.savefig(stream, format="png", dpi=min(120.0, 65_000 / max(width, height)))


@contextlib.contextmanager
def _axes(path: Path) -> Iterator[Any]:
    with new_figure(path) as figure:
        axes = figure.add_subplot()
        axes.grid(alpha=0.3)
        yield axes


def _label(score: str) -> str:
    return f"{score} (%)" if score.endswith("accuracy") else score


def _factor(score: str) -> int:
    return 100 if score.endswith("accuracy") else 1


def _shown(text: str) -> str:
    """Return a label that can be drawn: short, and without what no font has."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= _LABEL_LENGTH else text[: _LABEL_LENGTH - 1] + "…"


def draw_learning_curve(rows: list[dict[str, Any]], score: str, path: Path, title: str) -> None:
    """Plot training and validation scores, with 95% intervals, over the steps of metrics.jsonl."""
    with _axes(path) as axes:
        factor = _factor(score)
        key = f"train.{score}"
        train = [(row["step"], factor * row[key]) for row in rows if key in row]
        val = [row for row in rows if f"val.{score}" in row]
        if train:
            axes.plot(*zip(*train, strict=True), color="0.6", linewidth=1, label="training tasks")
        axes.errorbar(
            [row["step"] for row in val],
            [factor * row[f"val.{score}"] for row in val],
            [factor * row[f"val.{score}_ci95"] for row in val],
            marker="o", markersize=3, capsize=2, label="validation, 95% interval",
        )  # fmt: skip
        axes.set(xlabel="meta-training step", ylabel=_label(score), title=_shown(title))
        axes.legend()


def draw_lines(
    lines: dict[str, list[tuple[float, float, float]]], label: str, score: str, path: Path
) -> None:
    """Plot a score of several methods against a number with a label.

    Points are (x, mean, half-width of the 95% interval).
    """
    with _axes(path) as axes:
        factor = _factor(score)
        for method, points in lines.items():
            x, mean, ci95 = ([point[column] for point in points] for column in range(3))
            axes.errorbar(
                x, [factor * value for value in mean], [factor * value for value in ci95],
                marker="o", markersize=3, capsize=2, label=_shown(method),
            )  # fmt: skip
        axes.set(xlabel=label, ylabel=f"{_label(score)}, 95% interval")
        axes.legend(fontsize=8)


def draw_comparison(
    columns: dict[str, list[tuple[str, float, float]]], score: str, path: Path
) -> None:
    """Plot scores with error bars, one panel per protocol.

    Rows are (method, mean, half-width of the 95% interval).
    """
    heights = [0.35 * len(rows) + 0.9 for rows in columns.values()]
    with new_figure(path, 7.5, sum(heights)) as figure:
        panels = figure.subplots(len(columns), 1, height_ratios=heights, squeeze=False)[:, 0]
        factor = _factor(score)
        for axes, (title, rows) in zip(panels, columns.items(), strict=True):
            y = list(range(len(rows)))[::-1]
            axes.errorbar(
                [factor * mean for _, mean, _ in rows], y,
                xerr=[factor * ci95 for *_, ci95 in rows],
                fmt="o", markersize=4, capsize=3,
            )  # fmt: skip
            axes.set_yticks(y, [_shown(name) for name, *_ in rows], fontsize=8)
            axes.set_ylim(-0.6, len(rows) - 0.4)
            axes.set_title(_shown(title), fontsize=9)
            axes.grid(alpha=0.3, axis="x")
        panels[-1].set_xlabel(f"test {_label(score)}, 95% interval")
