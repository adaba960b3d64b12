"""Write predictions as CSV, JSON and a page, with what a user should know about them."""

import base64
import csv
import io
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import ImageOps

from metalearn.data.files import opaque, open_image
from metalearn.predict.classifier import FewShotClassifier, Label
from metalearn.predict.inputs import Item
from metalearn.system.atomic import atomic_writer, write_json

_COLUMNS = (
    "file", "label", "probability", "second", "second_probability", "unknown", "plausible", "error",
)  # fmt: skip
#: Height and width of a thumbnail in pixels, and how many of the predictions have one.
_THUMBNAIL, _SHOWN = 96, 500
#: A class is named if fewer of its held-out examples than this share are recognised.
_WEAK = 0.8


def thumbnail(path: Path) -> str:
    """Return a small JPEG of an image as base64; "" if it cannot be read."""
    try:
        with open_image(path) as image:
            image.draft("RGB", (_THUMBNAIL, _THUMBNAIL))
            small = opaque(ImageOps.exif_transpose(image), "white")
            small.thumbnail((_THUMBNAIL, _THUMBNAIL))
            buffer = io.BytesIO()
            small.convert("RGB").save(buffer, "JPEG", quality=80)
    except Exception:  # a corrupt file can raise any exception in Pillow
        return ""
    return base64.b64encode(buffer.getvalue()).decode()


def note(name: str, value: Path | str) -> dict[str, str]:
    """Return what shows an item in pages: its name with a text, or with a thumbnail of an image."""
    own = {"text": value} if isinstance(value, str) else {"thumbnail": thumbnail(value)}
    return {"file": name, **own}


def summary(classifier: FewShotClassifier, labels: list[Label | None]) -> list[str]:
    """Say in sentences how far to trust the labels; None for one that cannot be read."""
    trust, names = classifier.confidence_, classifier.classes_.tolist()
    kind = "texts" if classifier.kind == "texts" else "images"
    readable = [label for label in labels if label is not None]
    lines = []
    if labels:
        missing = len(labels) - len(readable)
        unread = f", {missing} cannot be read" if missing else ""
        lines.append(f"{kind.capitalize()} labelled: {len(readable)}{unread}.")
    interval = trust.interval(len(readable) or None)
    if interval is not None:
        lines.append(
            f"Expect {100 * interval[0]:.0f} to {100 * interval[1]:.0f}% of the labels to be right "
            f"(95% interval, from cross-validation on {trust.examples} examples, if the {kind} are "
            "like these)."
        )
    elif classifier.calibrate:
        lines.append(
            "How many labels are right cannot be known from one example per class, and the "
            "probabilities are not calibrated; give at least two examples of each class."
        )
    rate = f"{100 * trust.error_rate:.0f}%"
    if trust.novelty_threshold is not None:
        unknown = sum(bool(label.unknown) for label in readable)
        count = f"{kind.capitalize()} that look like none of the classes (unknown): {unknown}. "
        lines.append(
            f"{count if labels else ''}By mistake, about {rate} of the {kind} of your classes are "
            "called unknown."
        )
    elif interval is not None:
        lines.append(
            f"Unknown {kind} and sets of plausible classes at an error rate of {rate} require "
            f"{round(1 / trust.error_rate) - 1} examples of classes with at least two; there are "
            f"{trust.examples}."
        )
    alone = [name for name in names if _count(classifier, name) == 1]
    if interval is not None and alone:
        lines.append(f"Not checked, as they have one example: {', '.join(map(str, alone))}.")
    weak = []
    for row, counts in enumerate(trust.confusion):
        total, right = sum(counts), counts[row]
        if total and right / total < _WEAK:
            wrong = [*counts[:row], -1.0, *counts[row + 1 :]]
            other = names[wrong.index(max(wrong))]
            text = f"{names[row]} ({right:.3g} of {total:.3g}, taken for {other})"
            weak.append((right / total, text))
    if weak:
        lines.append(
            "More examples would help most for: "
            + ", ".join(text for _, text in sorted(weak)[:3])
            + "; in brackets, how many of the examples are recognised without their label."
        )
    if doubts := doubtful(classifier):
        one = doubts[0]
        lines.append(
            f"Labels of your examples that look wrong: {len(doubts)}. First check {one['file']}: "
            f"labelled {one['label']}, looks like {one['likely']}."
        )
    return lines


def _count(classifier: FewShotClassifier, name: Any) -> int:
    return int((classifier.labels_ == name).sum())


def doubtful(classifier: FewShotClassifier) -> list[dict[str, Any]]:
    """List the examples whose label looks wrong, worst first."""
    names, labels = classifier.classes_.tolist(), classifier.labels_.tolist()
    return [
        {"file": classifier.notes_[row].get("file", f"example {row}"), "label": labels[row],
         "likely": names[likely], "probability": round(probability, 4), "example": row}
        for row, likely, probability in classifier.confidence_.doubtful
    ]  # fmt: skip


def content(
    classifier: FewShotClassifier,
    items: Sequence[Item],
    labels: list[Label | None],
    errors: dict[int, str],
) -> dict[str, Any]:
    """Return what predictions.json contains; an item without a label has an error, by its index."""
    trust = classifier.confidence_
    interval = trust.interval(sum(label is not None for label in labels) or None)
    predictions = []
    for index, (item, label) in enumerate(zip(items, labels, strict=True)):
        row: dict[str, Any] = {"file": item.name}
        row |= {"text": item.value} if item.kind == "texts" else {}
        row |= dict.fromkeys(_COLUMNS[1:]) | {"error": errors.get(index)}
        predictions.append(row if label is None else row | vars(label))
    return {
        "summary": summary(classifier, labels),
        "expected_accuracy": {
            "mean": trust.accuracy, "ci95": interval and list(interval), "examples": trust.examples,
        },
        "error_rate": trust.error_rate,
        "head": classifier.head_,
        "examples": {str(name): _count(classifier, name) for name in classifier.classes_.tolist()},
        "confusion": trust.confusion,
        "doubtful_examples": doubtful(classifier),
        "predictions": predictions,
    }  # fmt: skip


def labelled(
    classifier: FewShotClassifier, items: Sequence[Item], x: np.ndarray, errors: dict[int, str]
) -> dict[str, Any]:
    """Label items with what `represent` returned for them; return what predictions.json contains.

    `errors` says why some cannot be read, by index.
    """
    readable = [index for index in range(len(items)) if index not in errors]
    labels: list[Any] = [None] * len(items)
    for index, label in zip(readable, classifier.label(x[readable]), strict=True):
        labels[index] = label
    return content(classifier, items, labels, errors)


def harmless(cell: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula: text that begins so gets a quote."""
    is_formula = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{cell}" if is_formula else cell


def table(result: dict[str, Any]) -> str:
    """Return the predictions as CSV."""
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    has_texts = any("text" in row for row in result["predictions"])
    columns = ("file", "text", *_COLUMNS[1:]) if has_texts else _COLUMNS
    rows.writerow(columns)
    for row in result["predictions"]:
        cells = {
            **row,
            "unknown": {True: "yes", False: "no"}.get(row["unknown"], ""),
            "plausible": "; ".join(map(str, row["plausible"] or [])),
        }
        rows.writerow([harmless(_shown(cells[name])) for name in columns])
    return text.getvalue()


def write(
    folder: Path, classifier: FewShotClassifier, result: dict[str, Any], items: Sequence[Item]
) -> None:
    """Write predictions.csv, predictions.json and report.html, given the result of `content`."""
    page = _page(classifier, result, items)
    write_json(folder / "predictions.json", result)
    for name, document in (("predictions.csv", table(result)), ("report.html", page)):
        with atomic_writer(folder / name) as stream:
            stream.write(document.encode("utf-8", "backslashreplace"))


def _shown(cell: Any) -> str:
    return f"{cell:.4f}" if isinstance(cell, float) else "" if cell is None else str(cell)


def _page(classifier: FewShotClassifier, result: dict[str, Any], items: Sequence[Item]) -> str:
    """Render the page; the template escapes every text."""
    names, labels = classifier.classes_.tolist(), classifier.labels_.tolist()
    likely = {one["example"]: one["likely"] for one in result["doubtful_examples"]}
    examples = {name: [] for name in names}  # type: dict[Any, list[Any]]
    for row, label in enumerate(labels):
        own = classifier.notes_[row]
        caption = Path(str(own.get("file", ""))).name
        examples[label].append((own, caption, row in likely, likely.get(row)))
    order = sorted(
        zip(result["predictions"], items, strict=True),
        key=lambda pair: pair[0]["probability"] or 0.0,
    )
    rows = [
        (one, note(item.name, item.value) if place < _SHOWN or item.kind == "texts" else {})
        for place, (one, item) in enumerate(order)
    ]
    pairs = [
        (count, str(names[row]), str(names[column]))
        for row, counts in enumerate(result["confusion"])
        for column, count in enumerate(counts)
        if row != column and count > 0
    ]
    template = (resources.files("metalearn.predict") / "report.html").read_text()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = _shown
    environment.filters["percent"] = lambda share: "" if share is None else f"{100 * share:.1f}%"
    return environment.from_string(template).render(
        title=f"{len(items)} {items[0].kind if items else 'images'}, {len(names)} classes",
        result=result, examples=examples, rows=rows, pairs=sorted(pairs, reverse=True)[:50],
    )  # fmt: skip
