"""Decode images from folders and zips: in parallel, cached, with errors that name the file."""

import hashlib
import os
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metalearn.data.images import ClassImages
from metalearn.system.atomic import atomic_writer, remove_abandoned
from metalearn.system.errors import UserError, first_line, is_out_of_memory

SUFFIXES = frozenset(extension.lower() for extension in Image.registered_extensions())


class ImageFile(NamedTuple):
    """An image file in a folder or zip; `name` is its path inside, with '/'."""

    container: Path
    name: str

    def __str__(self) -> str:
        return str(self.container / self.name)


def list_images(container: Path) -> list[ImageFile]:
    """List all images in a folder or zip, sorted by name; raise UserError for a corrupt zip."""
    if container.is_dir():
        names = [
            path.relative_to(container).as_posix()
            for path in container.rglob("*")
            if path.is_file()
        ]
    else:
        try:
            with zipfile.ZipFile(container) as archive:
                names = [info.filename for info in archive.infolist() if not info.is_dir()]
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(
                f"{container} is not a readable zip archive ({error}); replace it"
            ) from None
    return [
        ImageFile(container, name)
        for name in sorted(names)
        if Path(name).suffix.lower() in SUFFIXES
        and not any(part.startswith((".", "__MACOSX")) for part in Path(name).parts)
    ]


def files_hash(containers: list[Path]) -> str:
    """Hash the content of archives, and the names, sizes and times of files in folders.

    Raises:
        UserError: For a file that cannot be read.
    """
    digest = hashlib.sha256()
    for container in containers:
        digest.update(container.name.encode())
        try:
            if container.is_dir():
                for file in list_images(container):
                    stat = (container / file.name).stat()
                    digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
            else:
                with container.open("rb") as stream:
                    while chunk := stream.read(1 << 20):
                        digest.update(chunk)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def decode(files: list[ImageFile], to_array: Callable[[Image.Image], np.ndarray]) -> Tensor:
    """Decode images in parallel.

    Args:
        files: At least one file.
        to_array: Converts an image to uint8 [C, H, W], the same shape for all.

    Returns:
        Images, uint8 [I, C, H, W], in the order of `files`.

    Raises:
        UserError: For the first file that cannot be read, with its name.
    """
    if not files:
        raise UserError("no images to decode")
    workers = os.cpu_count() or 1

    def decode_chunk(chunk: list[ImageFile]) -> np.ndarray:
        archives: dict[Path, zipfile.ZipFile] = {}
        arrays = []
        try:
            for file in chunk:
                try:
                    with _open(file, archives) as stream, Image.open(stream) as image:
                        arrays.append(to_array(image))
                # A corrupt file can raise any exception in Pillow and zipfile.
                except Exception as error:
                    if is_out_of_memory(error):
                        raise
                    raise UserError(
                        f"{file} is not a readable image ({first_line(error)}); "
                        "replace or remove it"
                    ) from None
        finally:
            for archive in archives.values():
                archive.close()
        return np.stack(arrays)

    size = -(-len(files) // (4 * workers))
    chunks = [files[start : start + size] for start in range(0, len(files), size)]
    with ThreadPoolExecutor(workers) as pool:  # Pillow releases the GIL to decode and resize
        parts = list(pool.map(decode_chunk, chunks))
    return torch.from_numpy(np.concatenate(parts))


def ink(
    image: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> np.ndarray:
    """Convert dark ink on light or transparent paper to uint8 [1, size, size], ink 255, paper 0."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return 255 - np.asarray(image.convert("L").resize((size, size), resample))[None]


def _open(file: ImageFile, archives: dict[Path, zipfile.ZipFile]) -> IO[bytes]:
    if file.container.is_dir():
        return (file.container / file.name).open("rb")
    if file.container not in archives:
        archives[file.container] = zipfile.ZipFile(file.container)
    return archives[file.container].open(file.name)


def cached(
    cache_dir: Path, name: str, settings: Any, make: Callable[[], ClassImages]
) -> ClassImages:
    """Load images from the cache, or make and cache them.

    The cache's key is a hash of `settings`, which includes the hash of the files.
    """
    path = cache_dir / f"{name}-{hashlib.sha256(repr(settings).encode()).hexdigest()[:16]}.pt"
    if path.is_file():
        try:
            return ClassImages(**torch.load(path, weights_only=True))
        except PermissionError:
            raise UserError(f"{path} cannot be read; choose another cache_dir") from None
        except Exception as error:  # a corrupt file can raise any exception
            if is_out_of_memory(error):
                raise
            print(f"{path} is corrupt; rebuilding it", file=sys.stderr)
    pictures = make()
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        remove_abandoned(cache_dir, older_than=3600)
        with atomic_writer(path) as stream:
            torch.save(
                {"images": pictures.images, "counts": pictures.counts, "names": pictures.names},
                stream,
            )
    except OSError as error:
        raise UserError(
            f"cache_dir={cache_dir} cannot be written ({error.strerror}); choose another folder"
        ) from None
    return pictures
