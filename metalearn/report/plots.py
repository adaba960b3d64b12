"""How scores are shown: as text, and as figures in PNG."""

from pathlib import Path
from typing import Any


def _figure(width: float, height: float) -> Any:
    """An empty figure, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _axes() -> tuple[Any, Any]:
    figure = _figure(6.4, 4)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _label(score: str) -> str:
    return f"{score} (%)" if score.endswith("accuracy") else score


def _factor(score: str) -> int:
    return 100 if score.endswith("accuracy") else 1


def draw_learning_curve(rows: list[dict[str, Any]], score: str, path: Path) -> None:
    """Training and validation score over meta-training steps, with the validation's 95% interval."""
    figure, axes = _axes()
    factor = _factor(score)
    train_key = "train.accuracy" if score == "accuracy" else "train.loss"
    train = [(row["step"], factor * row[train_key]) for row in rows if train_key in row]
    val = [row for row in rows if f"val.{score}" in row]
    if train:
        axes.plot(*zip(*train, strict=True), color="0.6", linewidth=1, label="training tasks")
    axes.errorbar(
        [row["step"] for row in val],
        [factor * row[f"val.{score}"] for row in val],
        [factor * row[f"val.{score}_ci95"] for row in val],
        marker="o", markersize=3, capsize=2, label="validation, 95% interval",
    )  # fmt: skip
    axes.set(xlabel="meta-training step", ylabel=_label(score))
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_lines(
    lines: dict[str, list[tuple[float, float, float]]], label: str, score: str, path: Path
) -> None:
    """A score of several methods over a number. lines: method -> (at, mean, half-width of the 95% interval)."""
    figure, axes = _axes()
    factor = _factor(score)
    for method, points in lines.items():
        at, mean, ci95 = ([row[column] for row in points] for column in range(3))
        axes.errorbar(
            at, [factor * value for value in mean], [factor * value for value in ci95],
            marker="o", markersize=3, capsize=2, label=method,
        )  # fmt: skip
    axes.set(xlabel=label, ylabel=f"{_label(score)}, 95% interval")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def draw_fits(methods: dict[str, dict[str, Any]], path: Path) -> None:
    """Fitted curves, a column a method, a row a support set.

    methods: method -> title of the row -> {"points": (x, y), "truth": (x, y), "curves": label -> y}.
    """
    titles = list(next(iter(methods.values())))
    figure = _figure(3 * len(methods), 2.6 * len(titles))
    panels = figure.subplots(len(titles), len(methods), sharex=True, sharey=True, squeeze=False)
    for column, (method, found) in enumerate(methods.items()):
        for row, title in enumerate(titles):
            axes, one = panels[row][column], found[title]
            axes.plot(*one["truth"], color="0.7", linewidth=3, label="truth")
            for label, y in one["curves"].items():
                axes.plot(one["truth"][0], y, linewidth=1, label=label)
            axes.plot(*one["points"], "k^", markersize=5, label="support set")
            axes.set_title(f"{method}, {title}", fontsize=9)
            axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def draw_comparison(
    columns: dict[str, list[tuple[str, float, float]]], score: str, path: Path
) -> None:
    """Scores with error bars, one panel a protocol. columns: title of the panel -> (method, mean, half-width)."""
    heights = [0.35 * len(rows) + 0.9 for rows in columns.values()]
    figure = _figure(7.5, sum(heights))
    panels = figure.subplots(len(columns), 1, height_ratios=heights, squeeze=False)[:, 0]
    factor = _factor(score)
    for axes, (title, rows) in zip(panels, columns.items(), strict=True):
        place = list(range(len(rows)))[::-1]
        axes.errorbar(
            [factor * mean for _, mean, _ in rows], place, xerr=[factor * ci95 for *_, ci95 in rows],
            fmt="o", markersize=4, capsize=3,
        )  # fmt: skip
        axes.set_yticks(place, [name for name, *_ in rows], fontsize=8)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3, axis="x")
    panels[-1].set_xlabel(f"test {_label(score)}, 95% interval")
    figure.savefig(path, dpi=120)
