"""From files on disk to decoded pictures: folders and zips, in parallel, cached, errors that name the file."""

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

from metalearn.atomic import remove_abandoned, replacing
from metalearn.data.images import Pictures
from metalearn.errors import UserError, first_line, ran_out

SUFFIXES = frozenset(extension.lower() for extension in Image.registered_extensions())


class PictureFile(NamedTuple):
    """One picture: a file below a folder, or a member of a zip; `name` is its path inside, with '/'."""

    container: Path
    name: str

    def __str__(self) -> str:
        return str(self.container / self.name)


def list_pictures(container: Path) -> list[PictureFile]:
    """All pictures below a folder or inside a zip, sorted by name. Raises: UserError for a broken zip."""
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
                f"{container} is not a readable zip archive ({error}); bring it again"
            ) from None
    return [
        PictureFile(container, name)
        for name in sorted(names)
        if Path(name).suffix.lower() in SUFFIXES
        and not any(part.startswith((".", "__MACOSX")) for part in Path(name).parts)
    ]


def files_hash(containers: list[Path]) -> str:
    """Changes when the files do: content of archives, and names, sizes and times of files in folders.

    Raises: UserError for a file that cannot be read.
    """
    digest = hashlib.sha256()
    for container in containers:
        digest.update(container.name.encode())
        try:
            if container.is_dir():
                for file in list_pictures(container):
                    stat = (container / file.name).stat()
                    digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
            else:
                digest.update(container.read_bytes())
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def decode(files: list[PictureFile], to_array: Callable[[Image.Image], np.ndarray]) -> Tensor:
    """Decodes pictures in parallel: uint8 [I, C, H, W] in the order given.

    Args: to_array: a picture to uint8 [C, H, W], alike for all.
    Raises: UserError naming the first file that cannot be read.
    """
    if not files:
        raise UserError("no pictures to decode")
    workers = os.cpu_count() or 1

    def decode_share(share: list[PictureFile]) -> np.ndarray:
        archives: dict[Path, zipfile.ZipFile] = {}
        arrays = []
        try:
            for file in share:
                try:
                    with _open(file, archives) as stream, Image.open(stream) as picture:
                        arrays.append(to_array(picture))
                except (
                    Exception
                ) as error:  # Pillow and zipfile let through whatever the bytes lead to
                    if ran_out(error):
                        raise
                    raise UserError(
                        f"{file} is not a readable picture ({first_line(error)}); replace or remove it"
                    ) from None
        finally:
            for archive in archives.values():
                archive.close()
        return np.stack(arrays)

    size = -(-len(files) // (4 * workers))
    with ThreadPoolExecutor(
        workers
    ) as pool:  # Pillow decodes and resizes outside the interpreter's lock
        parts = list(
            pool.map(
                decode_share, [files[start : start + size] for start in range(0, len(files), size)]
            )
        )
    return torch.from_numpy(np.concatenate(parts))


def ink(
    picture: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> np.ndarray:
    """Dark ink on light paper as uint8 [1, size, size], ink 255 on paper 0; what is transparent is paper."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return 255 - np.asarray(picture.convert("L").resize((size, size), resample))[None]


def _open(file: PictureFile, archives: dict[Path, zipfile.ZipFile]) -> IO[bytes]:
    if file.container.is_dir():
        return (file.container / file.name).open("rb")
    if file.container not in archives:
        archives[file.container] = zipfile.ZipFile(file.container)
    return archives[file.container].open(file.name)


def cached(cache_dir: Path, name: str, settings: Any, make: Callable[[], Pictures]) -> Pictures:
    """Pictures from the cache, or made now and kept, under a hash of `settings` (which hold the files' hash)."""
    path = cache_dir / f"{name}-{hashlib.sha256(repr(settings).encode()).hexdigest()[:16]}.pt"
    if path.exists():
        try:
            return Pictures(**torch.load(path, weights_only=True))
        except PermissionError:
            raise UserError(f"{path} cannot be read; choose another cache_dir") from None
        except Exception as error:  # a torn file of any kind
            if ran_out(error):
                raise
            print(f"{path} is damaged; making it again", file=sys.stderr)
    pictures = make()
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        remove_abandoned(cache_dir, older_than=3600)
        with replacing(path) as stream:
            torch.save(
                {"images": pictures.images, "counts": pictures.counts, "names": pictures.names},
                stream,
            )
    except OSError as error:
        raise UserError(
            f"cache_dir={cache_dir} cannot be written ({error.strerror}); choose another"
        ) from None
    return pictures
