"""Classifiers that change while they are used; their examples are on disk before a change ends.

Not for several threads: the server calls everything here in one.
"""

import dataclasses
import hashlib
import io
import secrets
import shutil
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import clone

from metalearn.predict import report, saved, uploads
from metalearn.predict.classifier import FewShotClassifier
from metalearn.predict.inputs import Item
from metalearn.predict.networks import open_network
from metalearn.predict.uploads import Limits, Refused, Upload, reading
from metalearn.system.atomic import sync_folder
from metalearn.system.errors import UserError, first_line

_JSON = "examples.json"
#: Learned classifiers and represented items that stay in memory.
_LEARNED, _REPRESENTED = 16, 2048


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of a classifier: what is learned from, x [M, …]; class, id and note of each."""

    name: str
    x: np.ndarray
    labels: list[str]
    notes: list[dict[str, Any]]


class _Recent(OrderedDict[Hashable, Any]):
    """The most recently used values."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def recall(self, key: Hashable) -> Any:
        """Return a value, or None."""
        if key in self:
            self.move_to_end(key)
        return self.get(key)

    def keep(self, key: Hashable, value: Any) -> Any:
        """Store a value, and return it."""
        self[key] = value
        if len(self) > self._size:
            self.popitem(last=False)
        return value


class ClassifierStore:
    """Classifiers over one network, each in a folder of its own; each network has a subfolder.

    `settings` are of every classifier, and its network; examples that it has are imported. Raise
    ValueError for a wrong setting, UserError for a network that does not exist, or a folder that
    cannot be read.
    """

    def __init__(self, folder: Path, settings: FewShotClassifier, limits: Limits) -> None:
        settings.check_settings()
        self.limits = limits
        self._settings: FewShotClassifier = clone(settings)
        network = open_network(settings.backbone, settings.run, settings.head != "auto", False)
        if network is None or network.identity is None:
            raise UserError("a classifier of feature vectors cannot be served; it takes no images")
        if network.kind not in ("images", "texts"):
            raise UserError(f"run={settings.run}: its inputs are no images and no texts")
        self.network = network
        self.folder = folder / network.identity[:16]
        self._learned, self._recent = _Recent(_LEARNED), _Recent(_REPRESENTED)
        self._all: dict[str, Examples] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        for one in sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
            if (one / _JSON).exists():
                with saved.reading(one, _JSON) as (content, arrays):
                    labels, notes = content["labels"], content["notes"]
                    if not len(arrays["x"]) == len(labels) == len(notes):
                        raise ValueError("numbers of examples differ")
                    self._all[one.name] = Examples(content["name"], arrays["x"], labels, notes)
            elif one.is_dir():  # of a request that did not end
                shutil.rmtree(one)
        if hasattr(settings, "classes_"):
            self._import(settings)

    def _import(self, classifier: FewShotClassifier) -> None:
        """Add a saved classifier, unless it was added before."""
        x, labels = classifier.examples_, [str(label) for label in classifier.labels_]
        own = hashlib.sha256(x.tobytes() + repr(labels).encode()).hexdigest()[:16]
        notes = [{"file": "", "thumbnail": "", **note, "id": _new()} for note in classifier.notes_]
        if own not in self._all:
            self._write(own, Examples("classifier", x, labels, notes))

    def __len__(self) -> int:
        return len(self._all)

    def _get(self, own: str) -> Examples:
        if own not in self._all:
            raise Refused(404, "there is no such classifier")
        return self._all[own]

    def _write(self, own: str, examples: Examples) -> None:
        """Save examples; they count once they are on disk."""
        content = {"name": examples.name, "labels": examples.labels, "notes": examples.notes}
        saved.write(self.folder / own, content, {"x": examples.x}, _JSON)
        self._all[own] = examples

    def briefs(self) -> list[dict[str, Any]]:
        """Return id, name and number of examples of each class of all classifiers."""
        return [self._brief(own) for own in self._all]

    def _brief(self, own: str) -> dict[str, Any]:
        one = self._get(own)
        counts = {label: one.labels.count(label) for label in sorted(set(one.labels))}
        return {"id": own, "name": one.name, "classes": counts, "missing": self._missing(one)}

    def _missing(self, one: Examples) -> str:
        """Return what is missing before a classifier can predict, or ""."""
        count, way = len(set(one.labels)), self.network.way
        if way is not None and count != way:
            return f"this run distinguishes exactly {way} classes; there are {count}"
        return "" if count >= 2 else f"at least 2 classes are required; there are {count}"

    def describe(self, own: str) -> dict[str, Any]:
        """Return a classifier with its examples and, if it can predict, what to expect of it."""
        one = self._get(own)
        notes = [note | {"label": label} for note, label in zip(one.notes, one.labels, strict=True)]
        result = self._brief(own) | {"examples": notes, "summary": [], "doubtful_examples": []}
        if not result["missing"]:
            about = report.content(self._learn(own), [], [], {})
            result |= {key: about[key] for key in ("summary", "doubtful_examples", "head")}
            for doubt in result["doubtful_examples"]:
                doubt["id"] = one.notes[doubt["example"]]["id"]
        return result

    def create(self, name: str, sent: Sequence[Upload], labels: Sequence[str]) -> dict[str, Any]:
        """Create a classifier, with examples or without."""
        if len(self._all) >= self.limits.classifiers:
            raise Refused(409, f"there are {len(self._all)} classifiers, the limit; delete one")
        empty = Examples(self._checked(name or "classifier", "name"), np.zeros(0), [], [])
        own = _new()
        self._write(own, self._extended(empty, sent, labels)[0] if sent else empty)
        return self._brief(own)

    def add(self, own: str, sent: Sequence[Upload], labels: Sequence[str]) -> dict[str, Any]:
        """Add examples with a class for each or for all: all are on disk at the end, or none."""
        examples, added = self._extended(self._get(own), sent, labels)
        self._write(own, examples)
        return self._brief(own) | {"added": added}

    def _extended(
        self, one: Examples, sent: Sequence[Upload], labels: Sequence[str]
    ) -> tuple[Examples, list[dict[str, Any]]]:
        if len(labels) == 1:
            labels = [labels[0]] * len(sent)
        if len(labels) != len(sent):
            what = "files" if self.network.kind == "images" else "texts"
            raise Refused(422, f"{len(sent)} {what} have {len(labels)} labels")
        labels = [self._checked(label, "label") for label in labels]
        if len(one.labels) + len(labels) > self.limits.examples:
            raise Refused(409, f"a classifier has at most {self.limits.examples} examples")
        if len({*one.labels, *labels}) > self.limits.classes:
            raise Refused(409, f"a classifier has at most {self.limits.classes} classes")
        with reading(sent, self.network.kind, self.limits) as (items, errors):
            x = self._represented(items, errors)
            for index, reason in errors.items():
                kind = self.network.kind[:-1]
                raise Refused(422, f"{items[index].name} is not a readable {kind} ({reason})")
            notes = [{"id": _new(), **report.note(item.name, item.value)} for item in items]
        x = np.concatenate([one.x, x]) if one.labels else x
        added = [note | {"label": label} for note, label in zip(notes, labels, strict=True)]
        return Examples(one.name, x, [*one.labels, *labels], one.notes + notes), added

    def remove(self, own: str, what: str, value: str) -> dict[str, Any]:
        """Remove the example with this "id", or all of this "label"."""
        one = self._get(own)
        values = one.labels if what == "label" else [note["id"] for note in one.notes]
        stays = [index for index, other in enumerate(values) if other != value]
        if len(stays) == len(values):
            raise Refused(404, f"there is no example with this {what}")
        labels, notes = [one.labels[index] for index in stays], [one.notes[i] for i in stays]
        self._write(own, Examples(one.name, one.x[stays], labels, notes))
        return self._brief(own)

    def delete(self, own: str) -> None:
        """Delete a classifier."""
        self._get(own)
        (self.folder / own / _JSON).unlink()
        sync_folder(self.folder / own)
        del self._all[own]
        shutil.rmtree(self.folder / own, ignore_errors=True)  # what remains goes at the next start

    def predict(self, own: str, sent: Sequence[Upload]) -> dict[str, Any]:
        """Label images or texts; return what predictions.json contains."""
        classifier = self._learn(own)
        with reading(sent, self.network.kind, self.limits) as (items, errors):
            x = self._represented(items, errors)
        return report.labelled(classifier, items, x, errors)

    def archive(self, own: str) -> bytes:
        """Return a zip of the saved classifier, for `metalearn predict classifier=<unzipped>`."""
        buffer = io.BytesIO()
        with tempfile.TemporaryDirectory() as name, zipfile.ZipFile(buffer, "w") as archive:
            self._learn(own).save(name)
            for path in sorted(Path(name).rglob("*")):
                archive.write(path, path.relative_to(name))
        return buffer.getvalue()

    def _learn(self, own: str) -> FewShotClassifier:
        """Return the classifier that has learned the current examples."""
        one = self._get(own)
        if missing := self._missing(one):
            raise Refused(409, missing)

        key = tuple(note["id"] for note in one.notes)
        if (classifier := self._learned.recall(key)) is None:
            classifier = clone(self._settings).use(self.network)
            try:
                classifier.fit(one.x, np.array(one.labels), one.notes)
            except (UserError, ValueError) as error:
                raise Refused(409, first_line(error)) from None
            self._learned.keep(key, classifier)
        return classifier  # type: ignore[no-any-return]

    def _represented(self, items: Sequence[Item], errors: dict[int, str]) -> np.ndarray:
        """Represent items, recent ones from memory; `errors` gets why some cannot be read."""
        keys = [uploads.key(item) for item in items]
        rows = [None if i in errors else self._recent.recall(key) for i, key in enumerate(keys)]
        missing = [i for i, row in enumerate(rows) if row is None and i not in errors]
        failed: dict[int, str] = {}
        made = self.network.represent([items[index].value for index in missing], failed)
        for number, index in enumerate(missing):
            rows[index] = made[number]
            if number in failed:
                reason, item = failed[number], items[index]
                is_file = isinstance(item.value, Path)
                errors[index] = reason.replace(str(item.value), item.name) if is_file else reason
            else:
                self._recent.keep(keys[index], made[number])
        blank = np.zeros(made.shape[1:], made.dtype)
        return np.stack([blank if row is None else row for row in rows])

    def _checked(self, text: str, what: str) -> str:
        """Return a name without blanks around it; refuse an empty, long or unprintable one."""
        text = text.strip()
        if not text or len(text) > self.limits.name or not text.isprintable():
            raise Refused(422, f"a {what} has 1 to {self.limits.name} printable characters")
        return text


def _new() -> str:
    return secrets.token_hex(8)
