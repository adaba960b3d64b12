"""Classifiers that change while they are used; their examples are on disk before a change ends.

Not for several threads: the server calls everything here in one.
"""

import contextlib
import dataclasses
import hashlib
import io
import secrets
import shutil
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from sklearn.base import clone

from metalearn.data.files import open_image
from metalearn.predict import report, saved
from metalearn.predict.classifier import FewShotClassifier
from metalearn.predict.networks import open_network
from metalearn.system.atomic import sync_folder
from metalearn.system.errors import UserError, first_line

_JSON = "examples.json"
#: What a browser shows; other formats are not decoded for strangers.
_FORMATS = ("PNG", "JPEG", "MPO", "GIF", "BMP", "WEBP", "TIFF")
#: Learned classifiers and represented images that stay in memory.
_LEARNED, _REPRESENTED = 16, 2048


@dataclasses.dataclass(frozen=True)
class Limits:
    """Largest numbers of what a stranger can make the server keep or do.

    Attributes:
        body: Bytes of a request.
        files: Images of a request.
        pixels: Pixels of an image.
        all_pixels: Pixels of all images of a request.
        classifiers: Classifiers.
        examples: Examples of a classifier.
        classes: Classes of a classifier.
        name: Characters of the name of a class, classifier or file.
        waiting: Requests that are served or wait.
        seconds: Time in which a request must have arrived.
    """

    body: int = 32 * 2**20
    files: int = 64
    pixels: int = 64 * 10**6
    all_pixels: int = 256 * 10**6
    classifiers: int = 64
    examples: int = 1000
    classes: int = 100
    name: int = 100
    waiting: int = 32
    seconds: float = 60.0


class Refused(Exception):
    """A request that cannot be served: an HTTP status, and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Upload:
    """A file of a request; its name is shown and never becomes a path."""

    name: str
    stream: IO[bytes]


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of a classifier.

    Attributes:
        name: Its name.
        x: What is learned from [M, …].
        labels: Class of each example.
        notes: "id", "file" and "thumbnail" of each.
    """

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
    """Classifiers over one network, each in a folder of its own.

    Args:
        folder: Where to keep them; each network has a subfolder.
        settings: Settings of every classifier, and its network. Examples it has are imported.
        limits: See `Limits`.

    Raises:
        ValueError: For a wrong setting of the classifier.
        UserError: For a network that does not exist, or a folder that cannot be read.
    """

    def __init__(self, folder: Path, settings: FewShotClassifier, limits: Limits) -> None:
        settings.check_settings()
        self.limits = limits
        self._settings: FewShotClassifier = clone(settings)
        network = open_network(settings.backbone, settings.run, settings.head != "auto", False)
        if network is None or network.identity is None:
            raise UserError("a classifier of feature vectors cannot be served; it takes no images")
        if not network.takes_images:
            raise UserError(f"run={settings.run}: its inputs are no images; serve takes images")
        self.network = network
        self.folder = folder / network.identity[:16]
        self._learned, self._represented = _Recent(_LEARNED), _Recent(_REPRESENTED)
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

    def create(self, name: str, uploads: Sequence[Upload], labels: Sequence[str]) -> dict[str, Any]:
        """Create a classifier, with examples or without."""
        if len(self._all) >= self.limits.classifiers:
            raise Refused(409, f"there are {len(self._all)} classifiers, the limit; delete one")
        empty = Examples(self._checked(name or "classifier", "name"), np.zeros(0), [], [])
        own = _new()
        self._write(own, self._extended(empty, uploads, labels)[0] if uploads else empty)
        return self._brief(own)

    def add(self, own: str, uploads: Sequence[Upload], labels: Sequence[str]) -> dict[str, Any]:
        """Add examples; all of them are on disk at the end, or none is added.

        Args:
            own: The classifier's id.
            uploads: Images.
            labels: The class of each, or one for all.
        """
        examples, added = self._extended(self._get(own), uploads, labels)
        self._write(own, examples)
        return self._brief(own) | {"added": added}

    def _extended(
        self, one: Examples, uploads: Sequence[Upload], labels: Sequence[str]
    ) -> tuple[Examples, list[dict[str, Any]]]:
        if len(labels) == 1:
            labels = [labels[0]] * len(uploads)
        if not uploads or len(labels) != len(uploads):
            raise Refused(422, f"{len(uploads)} files have {len(labels)} labels")
        labels = [self._checked(label, "label") for label in labels]
        if len(one.labels) + len(labels) > self.limits.examples:
            raise Refused(409, f"a classifier has at most {self.limits.examples} examples")
        if len({*one.labels, *labels}) > self.limits.classes:
            raise Refused(409, f"a classifier has at most {self.limits.classes} classes")
        with self._read(uploads) as (paths, x, errors):
            for index, reason in errors.items():
                raise Refused(422, f"{uploads[index].name} is not a readable image ({reason})")
            added = [
                {"id": _new(), "file": upload.name[: self.limits.name],
                 "thumbnail": report.thumbnail(path), "label": label}
                for upload, path, label in zip(uploads, paths, labels, strict=True)
            ]  # fmt: skip
        notes = [{key: note[key] for key in ("id", "file", "thumbnail")} for note in added]
        x = np.concatenate([one.x, x]) if one.labels else x
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

    def predict(self, own: str, uploads: Sequence[Upload]) -> dict[str, Any]:
        """Label images; return what predictions.json contains."""
        classifier = self._learn(own)
        if not uploads:
            raise Refused(422, "there is no file")
        with self._read(uploads) as (_, x, errors):
            pass
        return report.labelled(classifier, [one.name for one in uploads], x, errors)

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

    @contextlib.contextmanager
    def _read(
        self, uploads: Sequence[Upload]
    ) -> Iterator[tuple[list[Path], np.ndarray, dict[int, str]]]:
        """Represent images; those of recent requests are not embedded again.

        Yields:
            Files of the images, what represents them, and why some cannot be read, by index.
        """
        with tempfile.TemporaryDirectory() as name:
            paths = [Path(name) / str(number) for number in range(len(uploads))]
            keys, errors, total = [], {}, 0
            for index, (path, upload) in enumerate(zip(paths, uploads, strict=True)):
                data = upload.stream.read()
                path.write_bytes(data)
                keys.append(hashlib.sha256(data).digest())
                if (pixels := _pixels(path)) is None:
                    errors[index] = f"not one of {', '.join(_FORMATS)}"
                total += pixels or 0
                if (pixels or 0) > self.limits.pixels or total > self.limits.all_pixels:
                    raise Refused(
                        413, f"{upload.name} has too many pixels; at most {self.limits.pixels:,} "
                        f"are read, and {self.limits.all_pixels:,} in a request",
                    )  # fmt: skip
            rows = [
                None if i in errors else self._represented.recall(k) for i, k in enumerate(keys)
            ]
            missing = [i for i, row in enumerate(rows) if row is None and i not in errors]
            failed: dict[int, str] = {}
            made = self.network.represent([paths[index] for index in missing], failed)
            for number, index in enumerate(missing):
                rows[index] = made[number]
                if number in failed:
                    errors[index] = failed[number].replace(str(paths[index]), uploads[index].name)
                else:
                    self._represented.keep(keys[index], made[number])
            blank = np.zeros(made.shape[1:], made.dtype)
            yield paths, np.stack([blank if row is None else row for row in rows]), errors

    def _checked(self, text: str, what: str) -> str:
        """Return a name without blanks around it; refuse an empty, long or unprintable one."""
        text = text.strip()
        if not text or len(text) > self.limits.name or not text.isprintable():
            raise Refused(422, f"a {what} has 1 to {self.limits.name} printable characters")
        return text


def _new() -> str:
    return secrets.token_hex(8)


def _pixels(path: Path) -> int | None:
    """Return the number of pixels that a file's header states; None for no image to decode."""
    try:
        with open_image(path) as image:
            return image.width * image.height if image.format in _FORMATS else None
    except Image.DecompressionBombError:  # states more than Pillow ever decodes
        return sys.maxsize
    except Exception:  # a corrupt file can raise any exception in Pillow
        return None
