"""Plot scores as PNG files."""

import contextlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metalearn.system.atomic import atomic_writer

#: Longest label that is drawn, in characters.
_LABEL_LENGTH = 70
#: Longest name of a class.
_CLASS_LENGTH = 28


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


def _lines(text: str) -> str:
    """Return a title of several lines that can be drawn."""
    return "\n".join(map(_shown, text.split("\n")))


def _class_name(name: str) -> str:
    """Return the end of a name, where names of classes differ."""
    return _shown(name if len(name) <= _CLASS_LENGTH else "…" + name[1 - _CLASS_LENGTH :])


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
        axes.locator_params(axis="x", integer=True)  # they are counts
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


def draw_confusion(
    names: list[str], counts: list[list[int]], queries: list[list[int]], path: Path, title: str
) -> None:
    """Plot a confusion matrix.

    Args:
        names: Name of each class.
        counts: Queries of a class (row) that a class (column) was predicted for.
        queries: Queries of a class (row) in episodes that have a class (column).
        path: The file.
        title: Line above.
    """
    size = 2.6 + 0.42 * len(names)
    with new_figure(path, size + 1.2, size) as figure:
        axes = figure.add_subplot()
        pairs = [list(zip(*rows, strict=True)) for rows in zip(counts, queries, strict=True)]
        shares = [[100 * one / of if of else math.nan for one, of in row] for row in pairs]
        texts = [[f"{one}/{of}" for one, of in row] for row in pairs]
        image = _cells(axes, shares, texts, "Blues")
        places = range(len(names))
        short = [_class_name(name) for name in names]
        axes.set_xticks(places, short, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_yticks(places, short, fontsize=8)
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.set_title(_lines(title), fontsize=10)
        figure.colorbar(image, label="% of the queries in episodes with both classes", shrink=0.8)


def draw_heat_map(
    settings: tuple[str, str], ticks: tuple[list[str], list[str]], values: list[list[float]],
    score: str, is_higher_better: bool, path: Path, title: str,
) -> None:  # fmt: skip
    """Plot scores over two settings.

    Args:
        settings: Names of the setting of the rows and of that of the columns.
        ticks: Their values.
        values: Scores by row and column; NaN for a combination without a run. The best is framed.
        score: Name of the score.
        is_higher_better: False for errors.
        path: The file.
        title: Line above.
    """
    from matplotlib.patches import Rectangle

    factor = _factor(score)
    rows, columns = ticks
    with new_figure(path, 3.0 + 0.75 * len(columns), 1.8 + 0.5 * len(rows)) as figure:
        axes = figure.add_subplot()
        colours = "viridis" if is_higher_better else "viridis_r"
        scaled = [[factor * value for value in row] for row in values]
        form = "{:.1f}" if factor == 100 else "{:.3g}"
        texts = [[form.format(value) for value in row] for row in scaled]
        image = _cells(axes, scaled, texts, colours)
        axes.set_xticks(range(len(columns)), [_shown(one) for one in columns])
        axes.set_yticks(range(len(rows)), [_shown(one) for one in rows])
        axes.set(xlabel=settings[1], ylabel=settings[0])
        axes.set_title(_lines(title), fontsize=10)
        known = [
            (value if is_higher_better else -value, row, column)
            for row, own in enumerate(values)
            for column, value in enumerate(own)
            if not math.isnan(value)
        ]
        _, row, column = max(known)
        frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="C3", linewidth=3)
        frame.set_clip_on(False)
        axes.add_patch(frame)
        figure.colorbar(image, label=_label(score))


def _cells(axes: Any, values: list[list[float]], texts: list[list[str]], colours: str) -> Any:
    """Draw texts on cells coloured by values, return the image; NaN is grey and empty."""
    axes.set_facecolor("0.93")
    image = axes.imshow(values, cmap=colours, aspect="auto")
    for row, own in enumerate(values):
        for column, value in enumerate(own):
            if not math.isnan(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                is_dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
                axes.text(
                    column, row, texts[row][column], ha="center", va="center", fontsize=7.5,
                    color="white" if is_dark else "black",
                )  # fmt: skip
    return image


def draw_roc(
    false_positive: list[float], true_positive: list[float], equal: float, path: Path, title: str
) -> None:
    """Plot a receiver operating characteristic and mark where both kinds of errors are equal."""
    with new_figure(path, 5.2, 5.2) as figure:
        axes = figure.add_subplot()
        axes.grid(alpha=0.3)
        axes.plot([100 * one for one in false_positive], [100 * one for one in true_positive])
        axes.plot([0, 100], [100, 0], color="0.7", linewidth=0.8, linestyle="--")
        axes.plot([100 * equal], [100 - 100 * equal], "o", color="C3", label="equal error rate")
        axes.set(xlim=(-1, 101), ylim=(-1, 101), aspect="equal")
        axes.set(xlabel="accepted pairs of two classes (%)", ylabel="of one class (%)")
        axes.set_title(_lines(title), fontsize=9)
        axes.legend(loc="lower right")


def draw_embedding(
    points: list[tuple[float, float]], labels: list[int], states: list[str], names: list[str],
    explained: tuple[float, float], path: Path, title: str,
) -> None:  # fmt: skip
    """Plot support examples and queries of an episode in two dimensions.

    Args:
        points: Place of each example.
        labels: Class of each example.
        states: "support", "right" (a query with the right label) or "wrong", of each example.
        names: Name of each class.
        explained: Share of the variance along each axis.
        path: The file.
        title: Line above.
    """
    marks = {
        "right": dict(marker="o", s=26, alpha=0.65, linewidths=0),
        "wrong": dict(marker="X", s=70, edgecolors="black", linewidths=0.8),
        "support": dict(marker="*", s=230, edgecolors="black", linewidths=1),
    }
    titles = {"support": "support", "right": "query, right", "wrong": "query, wrong"}
    with new_figure(path, 7.6, 4.8) as figure:
        axes = figure.add_subplot()
        axes.grid(alpha=0.3)
        for state, mark in marks.items():
            for label in range(len(names)):
                own = [
                    point
                    for point, other, one in zip(points, labels, states, strict=True)
                    if (other, one) == (label, state)
                ]
                if own:
                    axes.scatter(*zip(*own, strict=True), color=f"C{label % 10}", **mark)
        for label, name in enumerate(names):
            axes.scatter([], [], color=f"C{label % 10}", marker="s", label=_class_name(name))
        for state, text in titles.items():
            axes.scatter([], [], color="0.6", label=text, **marks[state])
        axes.set_title(_lines(title), fontsize=10)
        axes.set(
            xlabel=f"first principal component ({explained[0]:.0%} of the variance)",
            ylabel=f"second ({explained[1]:.0%})",
        )
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
