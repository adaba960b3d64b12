"""Find the images or texts of a command: folders, zips, CSV and text files, patterns."""

import dataclasses
import glob
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from metalearn.data import tables
from metalearn.data.files import SUFFIXES, ImageFile, list_images
from metalearn.data.text import COLUMNS
from metalearn.system.errors import UserError

#: A file in a zip that unpacks to more than this is not read.
_MAX_BYTES = 2**28
_IMAGE_COLUMNS = {
    "path": ("path", "file", "filename", "image"),
    "label": ("label", "class", "category"),
}


@dataclasses.dataclass(frozen=True)
class Item:
    """An image or a text."""

    #: What a user calls it: its path, its path in a zip after the zip's, or the file and the row of
    #: a text.
    name: str
    #: The text; or the file of the image, which does not exist if it cannot be unpacked.
    value: Path | str
    label: str = ""  # its class; "" if none is given

    @property
    def kind(self) -> str:
        """Return "images" or "texts"."""
        return "texts" if isinstance(self.value, str) else "images"


def examples(source: str, unpacked: Path) -> list[Item]:
    """List labelled images or texts; raise UserError if there are none, or one has no label.

    The source is a folder or zip with a subfolder of images for each class, or a text file for
    each; or a CSV file (path, label or text, label). Zips are unpacked into a folder.
    """
    items = list(_items(Path(source).expanduser(), unpacked, source))
    if unlabelled := [item for item in items if not item.label]:
        layout = "images into one subfolder per class, or give a CSV file with the columns path"
        if unlabelled[0].kind == "texts":
            layout = "texts into one .txt file per class, or give a CSV file with the columns text"
        raise UserError(f"{source}: {unlabelled[0].name} has no label; put {layout} and label")
    if not items:
        raise UserError(
            f"{source}: no images there; it should contain one subfolder of images, or one .txt "
            "file, per class"
        )
    return items


def queries(sources: list[str], unpacked: Path) -> list[Item]:
    """List images or texts to label, each once: files, folders, zips, CSV files, or patterns.

    Zips are unpacked into a folder. Raise UserError if a source has none.
    """
    items: dict[str, Item] = {}
    for source in sources:
        path = Path(source).expanduser()
        paths = [path] if path.exists() else map(Path, sorted(glob.glob(str(path), recursive=True)))
        found = {item.name: item for one in paths for item in _items(one, unpacked, source)}
        if not found:
            is_pattern = glob.has_magic(str(path))
            reason = "no images there, and no .txt files"
            raise UserError(
                f"{source}: {reason if path.exists() or is_pattern else 'there is no such file'}"
            )
        items |= found
    return list(items.values())


def _items(path: Path, unpacked: Path, source: str) -> Iterator[Item]:
    suffix = path.suffix.lower()
    if not path.exists():
        raise UserError(f"{source}: there is no such file or folder")
    if path.is_dir() or suffix == ".zip":
        images = list_images(path)
        files = images or list_images(path, (".txt",))
        places: Iterator[Path] = (file.container / file.name for file in files)
        if suffix == ".zip":
            places = _unpack(path, files, unpacked)
        for file, place in zip(files, places, strict=True):
            inside = PurePosixPath(file.name)
            if images:
                yield Item(str(file), place, inside.parent.name)
            else:
                yield from _lines(place, str(file), inside.parent.name or inside.stem)
    elif suffix == ".csv":
        yield from _listed(path)
    elif suffix == ".txt":
        yield from _lines(path, str(path), "")
    else:
        yield Item(str(path), path)


def _unpack(path: Path, files: list[ImageFile], unpacked: Path) -> Iterator[Path]:
    """Unpack files of a zip under numbers: no name in it becomes a path."""
    first = len(list(unpacked.iterdir()))
    with zipfile.ZipFile(path) as archive:
        for number, packed in enumerate(files, first):
            file = unpacked / f"{number}{Path(packed.name).suffix}"
            file.touch()
            try:
                if archive.getinfo(packed.name).file_size <= _MAX_BYTES:
                    with archive.open(packed.name) as stream, file.open("wb") as copy:
                        shutil.copyfileobj(stream, copy)
            except (zipfile.BadZipFile, RuntimeError, EOFError, NotImplementedError, ValueError):
                file.write_bytes(b"")  # an unreadable image
            yield file


def _lines(path: Path, name: str, label: str) -> Iterator[Item]:
    """Read a text file: a text in each line that is not blank."""
    lines = re.split(r"\r\n|\r|\n", tables.read_text(path))
    if not any(map(str.strip, lines)):
        raise UserError(f"{name}: there is no text in this file; remove it")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield Item(f"{name}:{number}", line.strip(), label)


def _listed(path: Path) -> Iterator[Item]:
    """Read a CSV file of paths, which are relative to its folder, or of texts."""
    rows = tables.read_csv(path)
    header = {cell.strip().lower() for cell in rows[0]} if rows else set()
    is_image = bool(header & set(_IMAGE_COLUMNS["path"]))
    if rows and not header & {name for names in COLUMNS.values() for name in names}:
        first = path.parent / rows[0][0].strip()
        is_image |= first.suffix.lower() in SUFFIXES or os.path.isfile(first)
    cells, number = tables.table(path, rows, _IMAGE_COLUMNS if is_image else COLUMNS)
    for row, one in enumerate(cells, number):
        if is_image:
            yield Item(one["path"], path.parent / Path(one["path"]).expanduser(), one["label"])
        else:
            yield Item(f"{path}:{row}", one["text"], one["label"])
