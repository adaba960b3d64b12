"""Find the images of a command: folders, zips, CSV files, single files and patterns."""

import csv
import dataclasses
import glob
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from metalearn.data.files import list_images
from metalearn.system.errors import UserError, first_line

#: A file in a zip that unpacks to more than this is not read.
_MAX_BYTES = 2**28
_PATH_COLUMNS = ("path", "file", "filename", "image")
_LABEL_COLUMNS = ("label", "class", "category")


@dataclasses.dataclass(frozen=True)
class Item:
    """An image.

    Attributes:
        name: What a user calls it: its path, or its path in a zip after the zip's.
        path: Where it can be read; nothing is there if it could not be unpacked.
        label: Its class; "" if none is given.
    """

    name: str
    path: Path
    label: str = ""


def examples(source: str, unpacked: Path) -> list[Item]:
    """List labelled images.

    Args:
        source: A folder or zip with a subfolder for each class, or a CSV file (path, label).
        unpacked: Folder for the content of zips.

    Raises:
        UserError: If there are none, or an image has no label.
    """
    items = list(_items(Path(source).expanduser(), unpacked, source))
    if unlabelled := [item.name for item in items if not item.label]:
        raise UserError(
            f"{source}: {unlabelled[0]} has no label; put images into one subfolder per class, or "
            "give a CSV file with the columns path and label"
        )
    if not items:
        raise UserError(f"{source}: no images there; it should contain one subfolder per class")
    return items


def queries(sources: list[str], unpacked: Path) -> list[Item]:
    """List images to label: files, folders, zips, CSV files with a column path, or patterns.

    Args:
        sources: What to list; an image that occurs twice is listed once.
        unpacked: Folder for the content of zips.

    Raises:
        UserError: If a source has no images.
    """
    items: dict[str, Item] = {}
    for source in sources:
        path = Path(source).expanduser()
        paths = [path] if path.exists() else map(Path, sorted(glob.glob(str(path), recursive=True)))
        found = {item.name: item for one in paths for item in _items(one, unpacked, source)}
        if not found:
            raise UserError(f"{source}: no images there")
        items |= found
    return list(items.values())


def _items(path: Path, unpacked: Path, source: str) -> Iterator[Item]:
    if path.is_dir():
        for image in list_images(path):
            label = PurePosixPath(image.name).parent.name
            yield Item(str(path / image.name), path / image.name, label)
    elif not path.exists():
        raise UserError(f"{source}: there is no such file or folder")
    elif path.suffix.lower() == ".zip":
        yield from _unpack(path, unpacked)
    elif path.suffix.lower() == ".csv":
        yield from _listed(path)
    else:
        yield Item(str(path), path)


def _unpack(path: Path, unpacked: Path) -> Iterator[Item]:
    """Unpack the images of a zip under numbers: no name in it becomes a path."""
    first = len(list(unpacked.iterdir()))
    with zipfile.ZipFile(path) as archive:
        for number, image in enumerate(list_images(path), first):
            file = unpacked / f"{number}{Path(image.name).suffix}"
            file.touch()
            try:
                if archive.getinfo(image.name).file_size <= _MAX_BYTES:
                    with archive.open(image.name) as stream, file.open("wb") as copy:
                        shutil.copyfileobj(stream, copy)
            except (zipfile.BadZipFile, RuntimeError, EOFError, NotImplementedError, ValueError):
                file.write_bytes(b"")  # an unreadable image
            yield Item(str(path / image.name), file, PurePosixPath(image.name).parent.name)


def _listed(path: Path) -> Iterator[Item]:
    """Read a CSV file; its paths are relative to its folder."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = [row for row in csv.reader(stream) if any(row)]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is not a readable CSV file ({first_line(error)})") from None
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    column = next((header.index(name) for name in _PATH_COLUMNS if name in header), None)
    label = next((header.index(name) for name in _LABEL_COLUMNS if name in header), None)
    if column is None:  # no header
        column, label = 0, 1
    else:
        rows = rows[1:]
    for row in rows:
        name = row[column] if column < len(row) else ""
        given = row[label].strip() if label is not None and label < len(row) else ""
        yield Item(name, path.parent / Path(name).expanduser(), given)
