"""Compute what `metalearn plot` draws of a trained run.

Legend: T tasks, Q queries, E episodes, C classes of the split.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from metalearn.config.checking import check_config
from metalearn.report import plots, tables
from metalearn.report.console import print_line
from metalearn.report.loggers import Example
from metalearn.report.scores import write_csv
from metalearn.report.sheets import draw_sheet
from metalearn.report.tracker import read_rows
from metalearn.run import loop
from metalearn.run.build import Run
from metalearn.run.describe import Described
from metalearn.run.evaluate import measure_curve
from metalearn.run.loop import Tested
from metalearn.run.measure import trained_state
from metalearn.run.request import Request
from metalearn.run.verification import draw_pairs, embedded, roc
from metalearn.system.atomic import make_writable
from metalearn.system.errors import UserError
from metalearn.tasks.types import State, Task

#: Test episodes of all plots, if the run has more: intervals of a few percent, in seconds.
_EPISODES = 200
#: Classes of a confusion matrix; worst episodes, and the rows that they may have.
_CLASSES, _WORST, _ROWS = 14, 3, 20
#: Wrong texts of an episode that are printed, and characters of each.
_TEXTS, _TEXT_LENGTH = 5, 90


def confusion(tested: Tested, num_classes: int) -> tuple[Tensor, Tensor]:
    """Count confusions over episodes.

    Args:
        tested: The test episodes.
        num_classes: C.

    Returns:
        Queries of class i that class j was predicted for, float64 [C, C]; and queries of class i
        in episodes that have class j.
    """
    assert tested.classes is not None and tested.predicted is not None
    is_query = tested.classes >= 0
    pairs = tested.classes[is_query] * num_classes + tested.predicted[is_query]
    counts = torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
    queries_EC = torch.zeros(len(tested.classes), num_classes + 1, dtype=torch.float64)
    queries_EC.scatter_add_(
        1, tested.classes % (num_classes + 1), torch.ones_like(tested.classes, dtype=torch.float64)
    )
    queries_EC = queries_EC[:, :num_classes]  # the last column has the padding
    return counts.double(), queries_EC.T @ (queries_EC > 0).double()


def most_confused(counts: Tensor, number: int) -> list[int]:
    """Return up to `number` classes of the most frequent confusions (counts [C, C]), in order."""
    errors = counts.clone().fill_diagonal_(0)
    both = (errors + errors.T).triu()
    classes: dict[int, None] = {}
    for place in both.flatten().argsort(descending=True, stable=True).tolist():
        pair = divmod(place, len(counts))
        if both[pair] == 0 or len(classes.keys() | set(pair)) > number:
            break
        classes |= dict.fromkeys(pair)
    return list(classes)


def principal_components(x: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """Project points [M, D] on their first two principal components; also their variance shares."""
    centred = (x - x.mean(0)).double()
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    shares = [*(s**2 / (s**2).sum().clamp_min(1e-30)).tolist(), 0.0]
    points = u[:, :2] * s[:2]
    return torch.nn.functional.pad(points, (0, 2 - points.shape[1])), (shares[0], shares[1])


def predicted_episode(run: Run, state: State, number: int) -> tuple[Task, list[str], Tensor]:
    """Return a test episode, the names of its labels, and the predicted labels [Q]."""
    at = torch.tensor([number])
    task, classes = run.test.draw(at, 1), run.test.classes(at, 1)
    names = run.class_names[run.test_split]
    assert classes is not None
    chosen = run.test_engine.predictions(state, task).argmax(-1)[0].cpu()
    return task, [names[one] for one in classes[0].tolist()], chosen


def examples(run: Run, state: State, number: int = 0) -> list[Example]:
    """Return the examples of a test episode and their predictions; [] for tasks without classes."""
    if run.test.classes(torch.tensor([number]), 1) is None:
        return []
    described = Described(run.config, run.test_split)
    task, names, chosen = predicted_episode(run, state, number)
    result = []
    for label, row in enumerate(described.episode(number)):
        predicted = chosen[task.query.y[0].cpu() == label].tolist()
        for part, own in row.parts.items():
            shown = [names[one] for one in predicted] if part == "query" else [""] * len(own)
            for content, name in zip(own, shown, strict=True):
                content = 1 - content if described.is_ink else content
                result.append(Example(part, row.label, name, content))
    return result


class Figures:
    """The plots of one run; each method writes a file, or raises UserError if it does not apply."""

    def __init__(self, folder: Path, overrides: list[str], split: str) -> None:
        """Open a finished run; arguments as in `metalearn.run.evaluate.evaluate`."""
        request = Request.of(folder, overrides, split)
        if not any(word.startswith("test.episodes=") for word in overrides):
            most = min(_EPISODES, check_config(request.changed).test.episodes)
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

    @functools.cached_property
    def tested(self) -> Tested:
        """The test episodes."""
        if self.run.data.outputs is not None or not self.run.family.predicts:
            raise UserError("the tasks of this run have no classes")
        return loop.test(self.run, self.state, None)

    @functools.cached_property
    def ranking(self) -> list[int]:
        """Numbers of the test episodes, the worst first."""
        sign = 1 if self.run.metric.higher_is_better else -1
        order: list[int] = (sign * self.tested.scores).argsort(stable=True).tolist()
        return order

    def file(self, kind: str) -> Path:
        """Return the PNG file of a plot."""
        return self.request.files.plots / f"{kind}.png"

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
        metric = self.request.own.metric
        rows = list(read_rows(self.request.files.metrics))
        if not any(row["step"] for row in rows):
            raise UserError("the run was not trained")
        plots.draw_learning_curve(rows, metric, path, self.request.own.name)

    def steps(self, path: Path) -> None:
        """Draw the score over inner steps."""
        measure_curve(self.request, "steps", []).draw(path)

    def shots(self, path: Path) -> None:
        """Draw the score over shots."""
        if self.run.data.outputs is not None or not self.run.family.predicts:
            raise UserError("the tasks of this run have no classes")
        measure_curve(self.request, "shot", []).draw(path)

    def confusion(self, path: Path) -> None:
        """Draw the confusion matrix of the most confused classes."""
        names = self.run.class_names[self.run.test_split]
        counts, queries = confusion(self.tested, len(names))
        chosen = most_confused(counts, _CLASSES)
        if not chosen:
            raise UserError("no query was classified wrongly")
        plots.draw_confusion(
            [names[one] for one in chosen],
            counts[chosen][:, chosen].long().tolist(),
            queries[chosen][:, chosen].long().tolist(),
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
        for one in pairs[:3]:
            text = "{true} taken for {predicted}: {queries} of {of} queries".format(**one)
            self.lines.append(text)

    def embedding(self, path: Path) -> None:
        """Draw the features of an episode with the median score."""
        number = self.ranking[len(self.ranking) // 2]
        score = float(self.tested.scores[number])
        task, names, chosen = predicted_episode(self.run, self.state, number)
        support, query = embedded(self.run, self.state, task)
        points, explained = principal_components(torch.cat([support, query]).cpu())
        y = task.query.y[0].cpu()
        states = ["right" if one else "wrong" for one in (y == chosen).tolist()]
        plots.draw_embedding(
            [(one[0], one[1]) for one in points.tolist()],
            [*task.support.y[0].tolist(), *y.tolist()],
            ["support"] * len(support) + states,
            names,
            explained,
            path,
            f"{self.request.own.name}: features of the meta-trained network\n"
            f"{self.request.split} episode {number}, "
            f"{tables.format_value(self.run.metric.name, score)} right: the median",
        )

    def verification(self, path: Path) -> None:
        """Draw the receiver operating characteristic of pairs, and write their scores as CSV."""
        names = self.run.class_names[self.run.test_split]
        if self.run.data.outputs is not None or not self.run.family.predicts:
            raise UserError("the tasks of this run have no classes")
        pairs = draw_pairs(self.run, self.state)
        curve = roc(pairs.score, pairs.same, pairs.episode)
        scores = path.with_suffix(".csv")
        columns = (pairs.episode, pairs.query, pairs.support, pairs.same.long(), pairs.score)
        write_csv(
            scores,
            ("episode", "query", "support", "same", "score"),
            (
                (number, names[query], names[support], same, f"{score:.6g}")
                for number, query, support, same, score in zip(
                    *(column.tolist() for column in columns), strict=True
                )
            ),
        )
        auc, eer = (
            f"{100 * value:.2f}% (95% interval {100 * low:.2f} to {100 * high:.2f})"
            for value, low, high in (curve.auc, curve.eer)
        )
        count = f"{len(pairs.score):,} pairs of {self.run.config.test.episodes:,} episodes"
        plots.draw_roc(
            curve.false_positive, curve.true_positive, curve.eer[0], path,
            f"{self.request.own.name}, {self.request.split} classes: same class or not, {count}\n"
            f"area {auc}\nequal error rate {eer}",
        )  # fmt: skip
        self.facts["verification"] = {**curve.facts(), "pairs": len(pairs.score)}
        self.facts["verification"]["scores"] = str(scores)
        self.lines.append(
            f"verification: equal error rate {eer}, area under the curve {auc}; {count}: {scores}"
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
            task, names, chosen = predicted_episode(self.run, self.state, number)
            score = float(self.tested.scores[number])
            shown = tables.format_value(self.run.metric.name, score)
            heading = f"episode {number}: {shown} of {len(chosen)} queries"
            sheet.append((heading, []))
            verdicts.append([])
            wrong: list[tuple[str, str, Any]] = []
            y = task.query.y[0].cpu()
            for label, row in enumerate(described.episode(number)):
                own = [int(one) for one in chosen[y == label]]
                order = sorted(range(len(own)), key=lambda place: own[place] == label)
                queries = [row.parts["query"][place] for place in order]
                sheet.append((f"{row.label}  {label + 1}", [row.parts["support"], queries]))
                verdicts.append(
                    ["" if own[place] == label else str(own[place] + 1) for place in order]
                )
                wrong += [
                    (row.label, names[own[place]], row.parts["query"][place])
                    for place in order
                    if own[place] != label
                ]
            self._report(number, score, heading, wrong, bool(described.texts.texts))
        if self.run.data.inputs.kind != "images":
            raise UserError("their inputs are not images; they are printed")
        title = f"{self.title}: the worst of {len(self.ranking):,} episodes"
        headings = ["support", "queries; below: wrong predictions"]
        draw_sheet(path, title, sheet, headings, described.is_ink, verdicts)

    def _report(
        self, number: int, score: float, heading: str, wrong: list[Any], is_text: bool
    ) -> None:
        """Add an episode to the facts and the printed lines; `wrong` has class, label and query."""
        pairs = Counter((true, label) for true, label, _ in wrong)
        self.lines.append(
            f"{heading}; "
            + ", ".join(
                f"{true} taken for {label} x{n}" for (true, label), n in pairs.most_common(3)
            )
        )
        fact: dict[str, Any] = {"episode": number, self.run.metric.name: score}
        fact["wrong"] = [
            {"true": true, "predicted": label, **({"text": query} if is_text else {})}
            for true, label, query in wrong
        ]
        self.facts["worst_episodes"].append(fact)
        for true, label, query in wrong[:_TEXTS] if is_text else []:
            text = query if len(query) <= _TEXT_LENGTH else query[: _TEXT_LENGTH - 1] + "…"
            self.lines.append(f"  {text!r}: {label}, is {true}")


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
    """Draw a finished run into its folder `plots`.

    Args:
        folder: The run folder.
        kinds: Names in `KINDS`; [] for all that apply.
        overrides: Changes of the test, as in `evaluate`; `test.episodes` is at most 200 by default.
        split: The split whose classes are tested.
        console: Where to print.

    Returns:
        "files"; "left_out", kind -> reason; "confusions" and "worst_episodes", if drawn.

    Raises:
        UserError: If the run cannot be tested, or nothing can be drawn.
    """
    if other := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"kinds={other[0]}: should be among {', '.join(KINDS)}")
    figures = Figures(folder, overrides, split)
    make_writable(figures.request.files.plots)
    files: list[str] = []
    left_out: dict[str, str] = {}
    for kind in kinds or KINDS:
        try:
            KINDS[kind](figures, figures.file(kind))
        except UserError as error:
            left_out[kind] = str(error)
        else:
            files.append(str(figures.file(kind)))
    for line in figures.lines:
        print_line(console, line)
    for kind, reason in left_out.items():
        print_line(console, f"  left out: {kind} ({reason})")
    if not files and not figures.facts:
        raise UserError(next(iter(left_out.values())))
    for file in files:
        print_line(console, f"  {file}")
    return {"files": files, "left_out": left_out, **figures.facts}
