"""Write predictions as CSV, JSON and a page, with what a user should know about them."""

import base64
import csv
import html
import io
import string
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageOps

from metalearn.data.files import opaque, open_image
from metalearn.predict.classifier import FewShotClassifier, Label
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


def summary(classifier: FewShotClassifier, labels: list[Label | None]) -> list[str]:
    """Say in sentences how far to trust the labels.

    Args:
        classifier: The classifier.
        labels: Labels of the images; None for one that cannot be read.
    """
    trust, names = classifier.confidence_, classifier.classes_.tolist()
    images = [label for label in labels if label is not None]
    lines = []
    if labels:
        missing = len(labels) - len(images)
        unread = f", {missing} cannot be read" if missing else ""
        lines.append(f"Images labelled: {len(images)}{unread}.")
    interval = trust.interval(len(images) or None)
    if interval is not None:
        lines.append(
            f"Expect {100 * interval[0]:.0f} to {100 * interval[1]:.0f}% of the labels to be right "
            f"(95% interval, from cross-validation on {trust.examples} examples, if the images are "
            "like these)."
        )
    elif classifier.calibrate:
        lines.append(
            "How many labels are right cannot be known from one example per class, and the "
            "probabilities are not calibrated; give at least two examples of each class."
        )
    rate = f"{100 * trust.error_rate:.0f}%"
    if trust.novelty_threshold is not None:
        unknown = sum(bool(label.unknown) for label in images)
        count = (
            f"Images that look like none of the classes (unknown): {unknown}. " if labels else ""
        )
        lines.append(
            f"{count}By mistake, about {rate} of the images of your classes are called unknown."
        )
    elif interval is not None:
        lines.append(
            f"Unknown images and sets of plausible classes at an error rate of {rate} require "
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
    names: list[str],
    labels: list[Label | None],
    errors: dict[int, str],
) -> dict[str, Any]:
    """Return what predictions.json contains.

    Args:
        classifier: The classifier.
        names: Name of each image.
        labels: Label of each image; None for one that cannot be read.
        errors: Why an image cannot be read, by its index.
    """
    trust = classifier.confidence_
    interval = trust.interval(sum(label is not None for label in labels) or None)
    predictions = []
    for index, (name, label) in enumerate(zip(names, labels, strict=True)):
        row = dict.fromkeys(_COLUMNS) | {"file": name, "error": errors.get(index)}
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
    classifier: FewShotClassifier, names: list[str], x: np.ndarray, errors: dict[int, str]
) -> dict[str, Any]:
    """Label represented images; return what predictions.json contains.

    Args:
        classifier: The classifier.
        names: Name of each image.
        x: What `represent` returned for them.
        errors: Why an image cannot be read, by its index.
    """
    readable = [index for index in range(len(names)) if index not in errors]
    labels: list[Any] = [None] * len(names)
    for index, label in zip(readable, classifier.label(x[readable]), strict=True):
        labels[index] = label
    return content(classifier, names, labels, errors)


def harmless(cell: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula: text that begins so gets a quote."""
    is_formula = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{cell}" if is_formula else cell


def table(result: dict[str, Any]) -> str:
    """Return the predictions as CSV."""
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(_COLUMNS)
    for row in result["predictions"]:
        cells = {
            **row,
            "unknown": {True: "yes", False: "no"}.get(row["unknown"], ""),
            "plausible": "; ".join(map(str, row["plausible"] or [])),
        }
        rows.writerow([harmless(_shown(cells[name])) for name in _COLUMNS])
    return text.getvalue()


def write(
    folder: Path, classifier: FewShotClassifier, result: dict[str, Any], paths: list[Path]
) -> None:
    """Write predictions.csv, predictions.json and report.html.

    Args:
        folder: Where to write.
        classifier: The classifier.
        result: What `content` returned.
        paths: The file of each prediction.
    """
    page = _page(classifier, result, paths)
    write_json(folder / "predictions.json", result)
    for name, document in (("predictions.csv", table(result)), ("report.html", page)):
        with atomic_writer(folder / name) as stream:
            stream.write(document.encode("utf-8", "backslashreplace"))


def _shown(cell: Any) -> str:
    return f"{cell:.4f}" if isinstance(cell, float) else "" if cell is None else str(cell)


def _page(classifier: FewShotClassifier, result: dict[str, Any], paths: list[Path]) -> str:
    """Compose the page; every text from outside is escaped."""
    template = resources.files("metalearn.predict") / "report.html"
    sections = [_examples_section(classifier, result)]
    order = sorted(
        range(len(paths)), key=lambda index: result["predictions"][index]["probability"] or 0.0
    )
    if order:
        head = ("", "file", "label", "probability", "second", "plausible classes", "unknown")
        rows = []
        for place, index in enumerate(order):
            one = result["predictions"][index]
            image = _image(thumbnail(paths[index]) if place < _SHOWN else "")
            second = f"{_shown(one['second'])} {_percent(one['second_probability'])}"
            plausible = one["plausible"]
            names_of = "none fits well" if plausible == [] else "; ".join(map(str, plausible or []))
            texts = [one["file"], one["error"] or one["label"], _percent(one["probability"])]
            texts += [second, names_of, "yes" if one["unknown"] else ""]
            rows.append(_row([image, *map(_cell, texts)]))
        sections.append(f"<h2>Predictions, least certain first</h2>\n{_table(head, rows)}")
    names = [str(name) for name in classifier.classes_.tolist()]
    if confusion := result["confusion"]:
        pairs = sorted(
            ((count, names[row], names[column])
             for row, counts in enumerate(confusion) for column, count in enumerate(counts)
             if row != column and count > 0),
            reverse=True,
        )  # fmt: skip
        rows = [_row(map(_cell, (one, other, f"{count:.3g}"))) for count, one, other in pairs[:50]]
        table = _table(("class", "taken for", "examples"), rows) if rows else "<p>None.</p>"
        sections.append(f"<h2>Confusions among your examples</h2>\n{table}")
    return string.Template(template.read_text()).substitute(
        title=f"{len(paths)} images, {len(names)} classes",
        summary="\n".join(f"<li>{html.escape(line)}</li>" for line in result["summary"]),
        sections="\n".join(sections),
    )


def _examples_section(classifier: FewShotClassifier, result: dict[str, Any]) -> str:
    doubts = {one["example"]: one["likely"] for one in result["doubtful_examples"]}
    parts = ["<h2>Your examples</h2>"]
    labels = classifier.labels_.tolist()
    for name in classifier.classes_.tolist():
        rows = [row for row, label in enumerate(labels) if label == name]
        parts.append(f"<h3>{html.escape(str(name))} ({len(rows)})</h3>")
        for row in rows:
            note = classifier.notes_[row]
            caption = html.escape(Path(str(note.get("file", ""))).name)
            if row in doubts:
                caption += f'<br><strong class="warn">{html.escape(str(doubts[row]))}?</strong>'
            image = _image(str(note.get("thumbnail", "")), "doubt" if row in doubts else "")
            parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    return "\n".join(parts)


def _image(thumbnail: str, style: str = "") -> str:
    source = html.escape(thumbnail)
    return f'<img class="{style}" alt="" src="data:image/jpeg;base64,{source}">' if source else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def _cell(value: Any) -> str:
    return html.escape(_shown(value))


def _row(cells: Any) -> str:
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _table(head: tuple[str, ...], rows: list[str]) -> str:
    cells = "".join(f"<th>{name}</th>" for name in head)
    body = "\n".join(rows)
    return f"<table><thead><tr>{cells}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
