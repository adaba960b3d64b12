"""Write predictions as CSV, JSON and a page, with what a user should know about them."""

import base64
import csv
import html
import io
import string
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

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
    """Say in sentences how far to trust the labels.

    Args:
        classifier: The classifier.
        labels: Labels of images or texts; None for one that cannot be read.
    """
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
    """Return what predictions.json contains.

    Args:
        classifier: The classifier.
        items: Images or texts.
        labels: Label of each; None for one that cannot be read.
        errors: Why one cannot be read, by its index.
    """
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
    """Label represented images or texts; return what predictions.json contains.

    Args:
        classifier: The classifier.
        items: The images or texts.
        x: What `represent` returned for them.
        errors: Why one cannot be read, by its index.
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
    """Write predictions.csv, predictions.json and report.html.

    Args:
        folder: Where to write.
        classifier: The classifier.
        result: What `content` returned.
        items: The image or text of each prediction.
    """
    page = _page(classifier, result, items)
    write_json(folder / "predictions.json", result)
    for name, document in (("predictions.csv", table(result)), ("report.html", page)):
        with atomic_writer(folder / name) as stream:
            stream.write(document.encode("utf-8", "backslashreplace"))


def _shown(cell: Any) -> str:
    return f"{cell:.4f}" if isinstance(cell, float) else "" if cell is None else str(cell)


def _page(classifier: FewShotClassifier, result: dict[str, Any], items: Sequence[Item]) -> str:
    """Compose the page; every text from outside is escaped."""
    template = resources.files("metalearn.predict") / "report.html"
    sections = [_examples_section(classifier, result)]
    order = sorted(
        range(len(items)), key=lambda index: result["predictions"][index]["probability"] or 0.0
    )
    if order:
        head = ("", "file", "label", "probability", "second", "plausible classes", "unknown")
        rows = []
        for place, index in enumerate(order):
            one = result["predictions"][index]
            item = items[index]
            is_shown = place < _SHOWN or item.kind == "texts"
            image = _shown_item(note(item.name, item.value)) if is_shown else ""
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
        title=f"{len(items)} {items[0].kind if items else 'images'}, {len(names)} classes",
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
            own = classifier.notes_[row]
            caption = html.escape(Path(str(own.get("file", ""))).name)
            if row in doubts:
                caption += f'<br><strong class="warn">{html.escape(str(doubts[row]))}?</strong>'
            image = _shown_item(own, "doubt" if row in doubts else "")
            parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    return "\n".join(parts)


def _shown_item(own: dict[str, Any], style: str = "") -> str:
    """Return the markup of a `note`."""
    if text := html.escape(str(own.get("text", ""))):
        return f'<blockquote class="{style}">{text}</blockquote>'
    source = html.escape(str(own.get("thumbnail", "")))
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
