"""Draw the plots of a trained run for `metalearn plot`."""

import functools
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from metalearn.report import plots, tables
from metalearn.report.console import print_lines
from metalearn.report.scores import write_csv
from metalearn.report.sheets import draw_sheet
from metalearn.report.tracker import read_rows
from metalearn.run import inspection, scoring
from metalearn.run.build import Run
from metalearn.run.describe import Described
from metalearn.run.evaluate import measure_curve
from metalearn.run.measure import trained_state
from metalearn.run.request import Request
from metalearn.run.scoring import Tested
from metalearn.run.verification import draw_pairs, embedded, roc
from metalearn.system.atomic import make_writable
from metalearn.system.errors import UserError, shortened
from metalearn.tasks.types import State

#: Test episodes of all plots, if the run has more: intervals of a few percent, in seconds.
_EPISODES = 200
#: Classes of a confusion matrix; worst episodes, and the rows that they may have.
_CLASSES, _WORST, _ROWS = 14, 3, 20
#: Wrong texts of an episode that are printed, and characters of each.
_TEXTS, _TEXT_LENGTH = 5, 90


class Figures:
    """The plots of one run; each method writes a file, or raises UserError if it does not apply.

    Arguments as in `metalearn.run.evaluate.evaluate`.
    """

    def __init__(self, folder: Path, overrides: list[str], split: str) -> None:
        request = Request.of(folder, overrides, split)
        if not any(word.startswith("test.episodes=") for word in overrides):
            most = min(_EPISODES, request.after.test.episodes)
            request = Request.of(folder, [*overrides, f"test.episodes={most}"], split)
        self.request = request
        self.facts: dict[str, Any] = {}
        self.lines: list[str] = []

    @functools.cached_property
    def run(self) -> Run:
        """The run under the requested protocol."""
        return self.request.run(self.request.statistics[0])

    @functools.cached_property
    def state(self) -> State:
        """The best state."""
        return trained_state(self.run, self.request.files.path)

    def _check_classes(self) -> None:
        if self.run.data.outputs is not None or not self.run.family.predicts:
            raise UserError("the tasks of this run have no classes")

    @functools.cached_property
    def tested(self) -> Tested:
        """The test episodes."""
        self._check_classes()
        return scoring.test(self.run, self.state, None)

    @functools.cached_property
    def ranking(self) -> list[int]:
        """Numbers of the test episodes, the worst first."""
        sign = 1 if self.run.metric.higher_is_better else -1
        order: list[int] = (sign * self.tested.scores).argsort(stable=True).tolist()
        return order

    def _right(self, number: int) -> str:
        """Return the score of an episode as text."""
        return tables.format_value(self.run.metric.name, float(self.tested.scores[number]))

    @property
    def title(self) -> str:
        """Name, shape and split, for titles."""
        protocol = self.run.protocol
        return (
            f"{self.request.own.name}, {protocol['way']}-way {protocol['shot']}-shot, "
            f"{self.request.split} classes"
        )

    def learning(self, path: Path) -> None:
        """Draw the learning curve."""
        rows = list(read_rows(self.request.files.metrics))
        if not any(row["step"] for row in rows):
            raise UserError(f"{self.request.files.metrics}: no metrics of training steps")
        own = self.request.own
        plots.draw_learning_curve(rows, own.metric, path, own.name)

    def steps(self, path: Path) -> None:
        """Draw the score over inner steps."""
        measure_curve(self.request, "steps", []).draw(path)

    def shots(self, path: Path) -> None:
        """Draw the score over shots."""
        self._check_classes()
        measure_curve(self.request, "shot", []).draw(path)

    def confusion(self, path: Path) -> None:
        """Draw the confusion matrix of the most confused classes."""
        names = self.run.class_names[self.run.test_split]
        counts, queries = inspection.confusion(self.tested, len(names))
        chosen = inspection.most_confused(counts, _CLASSES)
        if not chosen:
            raise UserError("no query was classified wrongly")
        plots.draw_confusion(
            [names[one] for one in chosen],
            counts[chosen][:, chosen].long().numpy(),
            queries[chosen][:, chosen].long().numpy(),
            path,
            f"{self.title}\n{len(chosen)} most confused of {len(names)} classes, "
            f"{len(self.tested.scores):,} episodes",
        )
        pairs: list[dict[str, Any]] = [
            {"true": names[i], "predicted": names[j], "queries": int(counts[i, j]),
             "of": int(queries[i, j])}
            for i, j in itertools.permutations(chosen, 2)
            if counts[i, j]
        ]  # fmt: skip
        pairs.sort(key=lambda one: (-one["queries"], one["of"]))
        self.facts["confusions"] = pairs
        text = "{true} taken for {predicted}: {queries} of {of} queries"
        self.lines += [text.format(**one) for one in pairs[:3]]

    def embedding(self, path: Path) -> None:
        """Draw the features of an episode with the median score."""
        number = self.ranking[len(self.ranking) // 2]
        task, names, chosen = inspection.predicted_episode(self.run, self.state, number)
        support, query = embedded(self.run, self.state, task)
        points, explained = inspection.principal_components(torch.cat([support, query]).cpu())
        y = task.query.y[0].cpu()
        plots.draw_embedding(
            points.numpy(),
            torch.cat([task.support.y[0].cpu(), y]).numpy(),
            ["support"] * len(support) + ["right" if one else "wrong" for one in y == chosen],
            names,
            explained,
            path,
            f"{self.request.own.name}: features of the meta-trained network\n{self.request.split} "
            f"episode {number}, {self._right(number)} right: the median",
        )

    def verification(self, path: Path) -> None:
        """Draw the receiver operating characteristic of pairs, and write their scores as CSV."""
        self._check_classes()
        pairs = draw_pairs(self.run, self.state)
        curve, auc, eer = roc(pairs.score, pairs.same, pairs.episode)
        scores = path.with_suffix(".csv")
        write_csv(
            scores,
            ("episode", "query", "support", "same", "score"),
            pairs.rows(self.run.class_names[self.run.test_split]),
        )
        area, error = (
            f"{100 * value:.2f}% (95% interval {100 * low:.2f} to {100 * high:.2f})"
            for value, low, high in (auc, eer)
        )
        count = f"{len(pairs.score):,} pairs of {self.run.config.test.episodes:,} episodes"
        title = f"{self.request.own.name}, {self.request.split} classes: {count}\n"
        title += f"area under the curve {area}\nequal error rate {error}"
        plots.draw_roc(curve, eer[0], path, title)
        self.facts["verification"] = {
            "auc": auc[0], "auc_ci95": auc[1:], "equal_error_rate": eer[0],
            "equal_error_rate_ci95": eer[1:], "pairs": len(pairs.score), "scores": str(scores),
        }  # fmt: skip
        self.lines.append(
            f"verification: equal error rate {error}, area under the curve {area}; {scores}"
        )

    def worst(self, path: Path) -> None:
        """Print the worst episodes, and draw their images."""
        described = Described(self.run.config, self.request.split)
        way = self.run.protocol["way"]
        most = max(1, min(_WORST, _ROWS // (way[-1] if isinstance(way, list) else way)))
        sheet: list[tuple[str, list[list[Tensor]]]] = []
        verdicts: list[list[str]] = []
        self.facts["worst_episodes"] = []
        for number in self.ranking[:most]:
            task, names, chosen = inspection.predicted_episode(self.run, self.state, number)
            heading = f"episode {number}: {self._right(number)} of {len(chosen)} queries"
            sheet.append((heading, []))
            verdicts.append([])
            wrong: list[dict[str, str]] = []
            for label, row in enumerate(described.episode(number)):
                own = chosen[task.query.y[0].cpu() == label].tolist()
                # The wrong ones first.
                queries = sorted(
                    zip(own, row["examples"]["query"], strict=True),
                    key=lambda pair: pair[0] == label,
                )
                images = [query for _, query in queries]
                sheet.append((f"{row['class']}  {label + 1}", [row["examples"]["support"], images]))
                verdicts.append(["" if one == label else str(one + 1) for one, _ in queries])
                wrong += [
                    {"true": row["class"], "predicted": names[one]}
                    | ({"text": query} if isinstance(query, str) else {})
                    for one, query in queries
                    if one != label
                ]
            pairs = Counter(f"{one['true']} taken for {one['predicted']}" for one in wrong)
            taken = ", ".join(f"{pair} x{count}" for pair, count in pairs.most_common(3))
            self.lines.append(f"{heading}; {taken}")
            for one in (one for one in wrong[:_TEXTS] if "text" in one):
                text = shortened(one["text"], _TEXT_LENGTH)
                self.lines.append(f"  {text!r}: {one['predicted']}, is {one['true']}")
            score = float(self.tested.scores[number])
            fact = {"episode": number, self.run.metric.name: score, "wrong": wrong}
            self.facts["worst_episodes"].append(fact)
        if self.run.data.inputs.kind != "images":
            raise UserError("their inputs are not images; they are printed")
        title = f"{self.title}: the worst of {len(self.ranking):,} episodes"
        headings = ["support", "queries (wrong predictions below)"]
        draw_sheet(path, title, sheet, headings, described.is_ink, verdicts)


#: Kinds of plots of a run, by the name of the file.
KINDS: dict[str, Callable[[Figures, Path], None]] = {
    "learning": Figures.learning,
    "steps": Figures.steps,
    "shots": Figures.shots,
    "confusion": Figures.confusion,
    "embedding": Figures.embedding,
    "verification": Figures.verification,
    "worst": Figures.worst,
}


def plot_run(
    folder: Path, kinds: list[str], overrides: list[str], split: str, console: Console
) -> dict[str, Any]:
    """Draw a finished run into its folder `plots`; `overrides` as in `evaluate`.

    `kinds` are names in `KINDS`; [] for all that apply. Return "files"; "left_out", kind -> reason;
    "confusions" and "worst_episodes", if drawn. Raise UserError if nothing can be drawn.
    """
    if other := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"kinds={other[0]}: should be among {', '.join(KINDS)}")
    figures = Figures(folder, overrides, split)
    make_writable(figures.request.files.plots)
    files: list[str] = []
    left_out: dict[str, str] = {}
    for kind in dict.fromkeys(kinds or KINDS):
        path = figures.request.files.plots / f"{kind}.png"
        try:
            KINDS[kind](figures, path)
            files.append(str(path))
        except UserError as error:
            left_out[kind] = str(error)
    if not files and not figures.facts:
        raise UserError(next(iter(left_out.values())))
    reasons = [f"left out: {kind} ({reason})" for kind, reason in left_out.items()]
    print_lines(console, figures.lines)
    print_lines(console, [*reasons, *files], "  ")
    return {"files": files, "left_out": left_out, **figures.facts}
