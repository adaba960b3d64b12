"""Read tar archives as zips."""

import contextlib
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from metalearn.data.files import list_images
from metalearn.system.errors import UserError, first_line

_TARS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")


def is_archive(name: str) -> bool:
    """Return True for the name of a zip or tar."""
    return name.lower().endswith((".zip", *_TARS))


@contextlib.contextmanager
def unpacked(archive: Path, folder: Path) -> Iterator[Path]:
    """Yield a folder or zip as it is, and a tar, also one in a zip, as a temporary zip.

    A tar can be read only from its beginning, a zip anywhere and by several threads. Raise
    UserError for a corrupt archive.
    """
    copy = folder / f".{archive.name}.{os.getpid()}.part"  # see `remove_abandoned`
    try:
        try:
            _copy_tars(archive, copy)
        # A corrupt archive can raise errors of several libraries.
        except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(
                f"{archive} cannot be read ({first_line(error)}); replace it if it is truncated"
            ) from None
        yield copy if copy.exists() else archive
    finally:
        copy.unlink(missing_ok=True)


def _copy_tars(archive: Path, copy: Path) -> None:
    """Copy a tar, or the tars in a zip without images, to a zip."""
    if archive.is_dir():
        return
    if archive.name.lower().endswith(_TARS):
        with archive.open("rb") as stream:
            _copy_tar(stream, copy)
        return
    if list_images(archive):
        return
    with zipfile.ZipFile(archive) as outer:
        for file in list_images(archive, {Path(name).suffix for name in _TARS}):
            if file.name.lower().endswith(_TARS):
                with outer.open(file.name) as stream:
                    _copy_tar(stream, copy)


def _copy_tar(stream: IO[bytes], copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=stream, mode="r|*") as tar, zipfile.ZipFile(copy, "a") as target:
        for member in tar:
            # A stream cannot follow links.
            if member.isfile() and (content := tar.extractfile(member)) is not None:
                with target.open(member.name, "w") as to:
                    shutil.copyfileobj(content, to)
