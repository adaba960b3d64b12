"""Plot scores as PNG files."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from metalearn.system.atomic import atomic_writer
from metalearn.system.errors import shortened

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
def _curves(path: Path, score: str, xlabel: str, ylabel: str, title: str = "") -> Iterator[Any]:
    """Yield a function that plots points (x, mean, half-width of the 95% interval) of a score."""
    with new_figure(path) as figure:
        axes = figure.add_subplot()
        axes.grid(alpha=0.3)

        def draw(points: list[tuple[float, ...]], label: str, **style: Any) -> None:
            x, *values = zip(*points, strict=True) if points else ((), (), ())
            mean, *ci95 = (_scaled(score, one) for one in values)
            style = style or {"marker": "o", "markersize": 3, "capsize": 2}
            axes.errorbar(x, mean, *ci95, label=_shown(label), **style)

        yield draw
        axes.set(xlabel=xlabel, ylabel=ylabel, title=_shown(title))
        axes.locator_params(axis="x", integer=True)  # x counts something
        axes.legend(fontsize=None if title else 8)


def _label(score: str) -> str:
    return f"{score} (%)" if score.endswith("accuracy") else score


def _scaled(score: str, values: Any) -> Any:
    """Return values of a score as they are shown: accuracies in percent."""
    return np.asarray(values, float) * (100 if score.endswith("accuracy") else 1)


def _shown(text: str) -> str:
    """Return a label that can be drawn: lines of limited length, without what no font has."""
    lines = text.encode("utf-8", "replace").decode().split("\n")
    return "\n".join(shortened(line, _LABEL_LENGTH) for line in lines)


def _class_name(name: str) -> str:
    """Return the end of a name, where names of classes differ."""
    return _shown(name if len(name) <= _CLASS_LENGTH else "…" + name[1 - _CLASS_LENGTH :])


def draw_learning_curve(rows: list[dict[str, Any]], score: str, path: Path, title: str) -> None:
    """Plot training and validation scores, with 95% intervals, over the steps of metrics.jsonl."""
    with _curves(path, score, "meta-training step", _label(score), title) as draw:
        key, val = f"train.{score}", f"val.{score}"
        train = [(row["step"], row[key]) for row in rows if key in row]
        if train:
            draw(train, "training tasks", color="0.6", linewidth=1)
        points = [(row["step"], row[val], row[f"{val}_ci95"]) for row in rows if val in row]
        draw(points, "validation, 95% interval")


def draw_lines(
    lines: dict[str, list[tuple[float, float, float]]], label: str, score: str, path: Path
) -> None:
    """Plot a score of several methods against a number with a label.

    Points are (x, mean, half-width of the 95% interval).
    """
    with _curves(path, score, label, f"{_label(score)}, 95% interval") as draw:
        for method, points in lines.items():
            draw(points, method)


def draw_comparison(
    columns: dict[str, list[tuple[str, float, float]]], score: str, path: Path
) -> None:
    """Plot scores with error bars, one panel per protocol.

    Rows are (method, mean, half-width of the 95% interval).
    """
    heights = [0.35 * len(rows) + 0.9 for rows in columns.values()]
    with new_figure(path, 7.5, sum(heights)) as figure:
        panels = figure.subplots(len(columns), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axes, (title, rows) in zip(panels, columns.items(), strict=True):
            names, mean, ci95 = zip(*rows, strict=True)
            y = range(len(rows) - 1, -1, -1)
            mean, ci95 = _scaled(score, mean), _scaled(score, ci95)
            axes.errorbar(mean, y, xerr=ci95, fmt="o", markersize=4, capsize=3)
            axes.set_yticks(y, map(_shown, names), fontsize=8)
            axes.set_ylim(-0.6, len(rows) - 0.4)
            axes.set_title(_shown(title), fontsize=9)
            axes.grid(alpha=0.3, axis="x")
        panels[-1].set_xlabel(f"test {_label(score)}, 95% interval")


def draw_confusion(
    names: list[str], counts: np.ndarray, queries: np.ndarray, path: Path, title: str
) -> None:
    """Plot a confusion matrix of C classes.

    Args:
        names: Name of each class.
        counts: Queries of a class (row) that a class (column) was predicted for, [C, C].
        queries: Queries of a class (row) in episodes that have a class (column), [C, C].
        path: The file.
        title: Line above.
    """
    size = 2.6 + 0.42 * len(names)
    with new_figure(path, size + 1.2, size) as figure:
        axes = figure.add_subplot()
        shares = np.where(queries > 0, 100 * counts / np.maximum(queries, 1), np.nan)
        pairs = [zip(*rows, strict=True) for rows in zip(counts, queries, strict=True)]
        texts = [[f"{count}/{of}" for count, of in row] for row in pairs]
        image = _cells(axes, shares, texts, "Blues")
        places = range(len(names))
        short = [_class_name(name) for name in names]
        axes.set_xticks(places, short, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_yticks(places, short, fontsize=8)
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.set_title(_shown(title), fontsize=10)
        figure.colorbar(image, label="% of the queries in episodes with both classes", shrink=0.8)


def draw_heat_map(
    settings: tuple[str, str], ticks: tuple[list[str], list[str]], values: list[list[float]],
    score: str, is_higher_better: bool, path: Path, title: str,
) -> None:  # fmt: skip
    """Plot scores over two settings, that of the rows and that of the columns.

    `ticks` are their values. `values` are NaN for a combination without a run; the best is framed.
    """
    from matplotlib.patches import Rectangle

    rows, columns = ticks
    with new_figure(path, 3.0 + 0.75 * len(columns), 1.8 + 0.5 * len(rows)) as figure:
        axes = figure.add_subplot()
        scaled = _scaled(score, values)
        form = "{:.1f}" if score.endswith("accuracy") else "{:.3g}"
        texts = [[form.format(value) for value in row] for row in scaled]
        image = _cells(axes, scaled, texts, "viridis" if is_higher_better else "viridis_r")
        axes.set_xticks(range(len(columns)), map(_shown, columns))
        axes.set_yticks(range(len(rows)), map(_shown, rows))
        axes.set(xlabel=settings[1], ylabel=settings[0])
        axes.set_title(_shown(title), fontsize=10)
        best = np.nanargmax(scaled if is_higher_better else -scaled)
        row, column = np.unravel_index(best, scaled.shape)
        frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="C3", linewidth=3)
        frame.set_clip_on(False)
        axes.add_patch(frame)
        figure.colorbar(image, label=_label(score))


def _cells(axes: Any, values: np.ndarray, texts: Any, colours: str) -> Any:
    """Draw texts on cells coloured by values, return the image; NaN is grey and empty."""
    axes.set_facecolor("0.93")
    image = axes.imshow(values, cmap=colours, aspect="auto")
    for row, column in np.argwhere(~np.isnan(values)):
        red, green, blue, _ = image.cmap(image.norm(values[row, column]))
        is_dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
        axes.text(
            column, row, texts[row][column], ha="center", va="center", fontsize=7.5,
            color="white" if is_dark else "black",
        )  # fmt: skip
    return image


def draw_roc(curve: np.ndarray, equal: float, path: Path, title: str) -> None:
    """Plot shares of accepted pairs of two and of one class [2, P]; mark the equal error rate."""
    with new_figure(path, 5.2, 5.2) as figure:
        axes = figure.add_subplot()
        axes.grid(alpha=0.3)
        axes.plot(*(100 * curve))
        axes.plot([0, 100], [100, 0], color="0.7", linewidth=0.8, linestyle="--")
        axes.plot([100 * equal], [100 - 100 * equal], "o", color="C3", label="equal error rate")
        axes.set(xlim=(-1, 101), ylim=(-1, 101), aspect="equal")
        axes.set(
            xlabel="accepted pairs of two classes (%)", ylabel="accepted pairs of one class (%)"
        )
        axes.set_title(_shown(title), fontsize=9)
        axes.legend(loc="lower center")


def draw_embedding(
    points: np.ndarray, labels: np.ndarray, states: list[str], names: list[str],
    explained: tuple[float, float], path: Path, title: str,
) -> None:  # fmt: skip
    """Plot support examples and queries of an episode at `points` [M, 2].

    The state of an example is "support", "right" (a query with the right label) or "wrong";
    `explained` is the share of the variance along each axis.
    """
    marks = {
        "right": dict(marker="o", s=26, alpha=0.65, linewidths=0),
        "wrong": dict(marker="X", s=70, edgecolors="black", linewidths=0.8),
        "support": dict(marker="*", s=230, edgecolors="black", linewidths=1),
    }
    titles = {"support": "support", "right": "query, right", "wrong": "query, wrong"}
    colours = [f"C{label % 10}" for label in range(len(names))]
    with new_figure(path, 7.6, 4.8) as figure:
        axes = figure.add_subplot()
        axes.grid(alpha=0.3)
        for state, mark in marks.items():
            for label, colour in enumerate(colours):
                own = points[(labels == label) & (np.array(states) == state)]
                axes.scatter(*own.T, color=colour, **mark)
        for name, colour in zip(names, colours, strict=True):
            axes.scatter([], [], color=colour, marker="s", label=_class_name(name))
        for state, text in titles.items():
            axes.scatter([], [], color="0.6", label=text, **marks[state])
        axes.set_title(_shown(title), fontsize=10)
        axes.set(
            xlabel=f"first principal component ({explained[0]:.0%} of the variance)",
            ylabel=f"second ({explained[1]:.0%})",
        )
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
