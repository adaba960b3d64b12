"""What a server receives: images and texts of strangers, with limits on each."""

import contextlib
import dataclasses
import hashlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from PIL import Image

from metalearn.data.files import open_image
from metalearn.predict.inputs import Item

#: What a browser shows; other formats are not decoded for strangers.
_FORMATS = ("PNG", "JPEG", "MPO", "GIF", "BMP", "WEBP", "TIFF")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Largest numbers of what a stranger can make the server keep or do."""

    body: int = 32 * 2**20  # bytes of a request
    files: int = 64  # images or texts of a request
    characters: int = 10_000  # characters of a text
    pixels: int = 64 * 10**6  # pixels of an image
    all_pixels: int = 256 * 10**6  # pixels of all images of a request
    classifiers: int = 64  # classifiers
    examples: int = 1000  # examples of a classifier
    classes: int = 100  # classes of a classifier
    name: int = 100  # characters of the name of a class, classifier or file
    waiting: int = 32  # requests that are served or wait
    seconds: float = 60.0  # time in which a request must have arrived


class Refused(Exception):
    """A request that cannot be served: an HTTP status, and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Upload:
    """A file of a request, whose name is shown and never becomes a path; or a text."""

    name: str
    content: IO[bytes] | str


@contextlib.contextmanager
def reading(
    sent: Sequence[Upload], kind: str, limits: Limits
) -> Iterator[tuple[list[Item], dict[int, str]]]:
    """Write images to temporary files, for a block; yield the items, and why some cannot be read.

    Raise Refused for none, too large ones, or those of a different kind than the network takes.
    """
    if not sent:
        raise Refused(422, "there is no file and no text")
    with tempfile.TemporaryDirectory() as name:
        items: list[Item] = []
        errors: dict[int, str] = {}
        total = 0
        for index, one in enumerate(sent):
            if isinstance(one.content, str) != (kind == "texts"):
                raise Refused(422, f"this server labels {kind}; see /docs")
            if isinstance(one.content, str):
                if len(one.content) > limits.characters:
                    raise Refused(413, f"a text has at most {limits.characters:,} characters")
                items.append(Item(one.name, one.content))
                continue
            path = Path(name) / str(index)
            path.write_bytes(one.content.read())
            items.append(Item(one.name, path))
            if (pixels := _pixels(path)) is None:
                errors[index] = f"not one of {', '.join(_FORMATS)}"
            total += pixels or 0
            if (pixels or 0) > limits.pixels or total > limits.all_pixels:
                raise Refused(
                    413, f"{one.name} has too many pixels; at most {limits.pixels:,} are read, and "
                    f"{limits.all_pixels:,} in a request",
                )  # fmt: skip
        yield items, errors


def key(item: Item) -> bytes:
    """Return a hash of an item's content."""
    if isinstance(item.value, str):
        return hashlib.sha256(item.value.encode("utf-8", "surrogatepass")).digest()
    return hashlib.sha256(item.value.read_bytes()).digest()


def _pixels(path: Path) -> int | None:
    """Return the number of pixels that a file's header states; None for no image to decode."""
    try:
        with open_image(path) as image:
            return image.width * image.height if image.format in _FORMATS else None
    except Image.DecompressionBombError:  # states more than Pillow ever decodes
        return sys.maxsize
    except Exception:  # a corrupt file can raise any exception in Pillow
        return None
