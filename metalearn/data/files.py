"""Decode images from folders and archives: in parallel, cached, with errors that name the file."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from metalearn.data.images import ClassImages
from metalearn.system.atomic import atomic_writer, remove_abandoned
from metalearn.system.errors import UserError, first_line, is_out_of_memory, writing

_T = TypeVar("_T")
#: Raster formats that Pillow decodes itself; vector formats would need another program. The first
#: that fits a file is used, so the one without a signature is last.
_FORMATS = (
    "PNG", "JPEG", "MPO", "GIF", "BMP", "DIB", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "ICO",
    "ICNS", "DDS", "SGI", "QOI", "PSD", "SUN", "XBM", "XPM", "PCX", "TGA",
)  # fmt: skip
#: Version of the content of cached files.
_CACHE_FORMAT = 2
SUFFIXES = frozenset(
    suffix for suffix, name in Image.registered_extensions().items() if name in _FORMATS
)


class Decoded(NamedTuple):
    """Images [I, C, H, W], unreadable files, number of transparent images, `pixel_hash` of each."""

    images: Tensor
    left_out: list["ImageFile"]
    transparent: int
    hashes: Tensor


class ImageFile(NamedTuple):
    """An image file in a folder or zip; `name` is its path inside, with '/'.

    `archive` is what the user knows the container as, if that is temporary.
    """

    container: Path
    name: str
    archive: Path | None = None

    @property
    def source(self) -> Path:
        """Return the folder or archive that the user knows."""
        return self.archive or self.container

    def __str__(self) -> str:
        return str(self.source / self.name)


def list_images(container: Path, suffixes: Container[str] = SUFFIXES) -> list[ImageFile]:
    """List the images, or files of some suffixes, in a folder or zip, sorted by name.

    Raise UserError for a corrupt zip.
    """
    if container.is_dir():
        paths = (path for path in container.rglob("*") if path.is_file())
        names = [path.relative_to(container).as_posix() for path in paths]
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
        if Path(name).suffix.lower() in suffixes
        and not any(part.startswith((".", "__MACOSX")) for part in Path(name).parts)
    ]


def files_hash(containers: list[Path], suffixes: Container[str] = SUFFIXES) -> str:
    """Hash the content of archives, and names, sizes and times of files in folders, by suffix.

    Raise UserError for a file that cannot be read.
    """
    digest = hashlib.sha256()
    for container in containers:
        digest.update(os.fsencode(container.name))
        try:
            if container.is_dir():
                for file in list_images(container, suffixes):
                    stat = (container / file.name).stat()
                    line = f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n"
                    digest.update(os.fsencode(line))
            else:
                with container.open("rb") as stream:
                    while chunk := stream.read(1 << 20):
                        digest.update(chunk)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def open_image(file: Path | IO[bytes]) -> Image.Image:
    """Open a raster image, whatever its suffix."""
    return Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])


def decode(
    files: list[ImageFile], to_array: Callable[[Image.Image], np.ndarray], unreadable: str = ""
) -> Decoded:
    """Decode images in parallel, in the order of `files`, and hash them as the files have them.

    `to_array` converts an image to uint8 [C, H, W], the same shape for all. `unreadable` is the
    setting: "skip" leaves out files that cannot be read, else they are a UserError; "" means that
    there is no such setting.
    """
    workers = os.cpu_count() or 1

    def decode_chunk(chunk: list[ImageFile]) -> tuple[Any, dict[ImageFile, str], int, list[int]]:
        arrays, failures, transparent, hashes = [], {}, 0, []
        with opener() as opened:
            for file in chunk:
                try:
                    with opened(file) as stream, open_image(stream) as image:
                        array = to_array(image)
                        hashes.append(pixel_hash(np.asarray(plain(image, "white", "RGB"))))
                        arrays.append(array)
                        transparent += is_transparent(image)
                # A corrupt file can raise any exception in Pillow and zipfile.
                except Exception as error:
                    if is_out_of_memory(error):
                        raise
                    is_unknown = isinstance(error, UnidentifiedImageError)
                    failures[file] = "unknown format" if is_unknown else first_line(error)
        return ([np.stack(arrays)] if arrays else []), failures, transparent, hashes

    size = -(-len(files) // (4 * workers))
    chunks = [files[start : start + size] for start in range(0, len(files), size)]
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        warnings.filterwarnings("ignore", module="PIL")  # about metadata, with paths of Pillow
        # Pillow releases the GIL to decode and resize.
        parts, failures, transparent, hashes = zip(*pool.map(decode_chunk, chunks), strict=True)
    failed = {file: reason for some in failures for file, reason in some.items()}
    if failed and (unreadable != "skip" or len(failed) == len(files)):
        (first, reason), *others = failed.items()
        more = f", nor are {len(others)} others: {named(file for file, _ in others)}"
        them = "them" if others else "it"
        hint = f", or set dataset.unreadable=skip to leave {them} out"
        raise UserError(
            f"{first} is not a readable image ({reason}){more if others else ''}; "
            f"replace or remove {them}{hint if unreadable == 'error' else ''}"
        )
    images = np.concatenate([array for arrays in parts for array in arrays])
    return Decoded(
        torch.from_numpy(images),
        list(failed),
        sum(transparent),
        torch.tensor([number for some in hashes for number in some]),
    )


def pixel_hash(pixels: np.ndarray) -> int:
    """Return a hash of an image uint8 [H, W, 3] that does not depend on its file: 64 bits.

    It is of the image in its own size: upright, in RGB, on white. So copies in different lossless
    formats have the same hash; copies that were resized or compressed with loss again have not.
    """
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(pixels.tobytes())
    return int.from_bytes(digest.digest()[:8], "little", signed=True)


def _stored_hashes(images: Tensor) -> Tensor | None:
    """Return `pixel_hash` of images [I, C, H, W] that were not read from files, int64 [I]."""
    channels = images.shape[1]
    if channels not in (1, 3):
        return None
    pixels = images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    return torch.tensor([pixel_hash(one) for one in pixels])


def named(files: Iterable[ImageFile]) -> str:
    """Return the names of the first ten files, and how many more there are."""
    names = [file.name for file in files]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def is_transparent(image: Image.Image) -> bool:
    """Return True if any pixel is transparent."""
    return _has_alpha(image) and bool((np.asarray(image.convert("RGBA"))[..., 3] < 255).any())


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "RGBa", "LA", "PA") or (
        "transparency" in image.info and image.mode in ("1", "L", "P", "RGB")
    )


def opaque(image: Image.Image, background: str) -> Image.Image:
    """Return an image without transparency, on a colour or with its own hidden colours ("none")."""
    if not _has_alpha(image):
        return image
    image = image.convert("RGBA")
    if background != "none":
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def plain(image: Image.Image, background: str, mode: str) -> Image.Image:
    """Return an image of any mode upright, without transparency (see `opaque`), in a mode."""
    image = opaque(ImageOps.exif_transpose(image), background)
    if image.mode.startswith("I"):  # 16 bits per pixel, which convert() would clip at 255
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    return image.convert(mode)


def ink(
    image: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> np.ndarray:
    """Convert dark ink on light or transparent paper to uint8 [1, size, size], ink 255, paper 0."""
    image = opaque(image, "white")
    return 255 - np.asarray(image.convert("L").resize((size, size), resample))[None]


@contextlib.contextmanager
def opener() -> Iterator[Callable[[ImageFile], IO[bytes]]]:
    """Yield a function that opens files, and each archive once."""
    with contextlib.ExitStack() as stack:
        archive = functools.cache(lambda path: stack.enter_context(zipfile.ZipFile(path)))

        def opened(file: ImageFile) -> IO[bytes]:
            if file.container.is_dir():
                return (file.container / file.name).open("rb")
            return archive(file.container).open(file.name)

        yield opened


def cached(
    cache_dir: Path, name: str, settings: Any, make: Callable[[], ClassImages]
) -> ClassImages:
    """Load images from the cache, or make and cache them.

    The cache's key is a hash of `settings`, which includes the hash of the files. Images without
    `hashes` are hashed as they are.
    """
    key = hashlib.sha256(repr((_CACHE_FORMAT, settings)).encode()).hexdigest()[:16]

    def content() -> dict[str, Any]:
        if sys.stderr.isatty():
            text = f"preparing the images of {name} (only the first time)"
            print(text, file=sys.stderr, flush=True)
        pictures = make()
        if pictures.hashes is None:
            pictures = dataclasses.replace(pictures, hashes=_stored_hashes(pictures.images))
        return vars(pictures)

    return stored(cache_dir / f"{name}-{key}.pt", content, lambda own: ClassImages(**own))


def stored(path: Path, make: Callable[[], dict[str, Any]], read: Callable[[Any], _T]) -> _T:
    """Return what `read` gives for a file of the cache, which is made if it is absent or corrupt.

    `make` returns tensors and plain data; `read` may raise anything for a wrong content. Raise
    UserError if the file cannot be read or written.
    """
    if path.is_file():
        try:
            return read(torch.load(path, weights_only=True))
        except PermissionError:
            raise UserError(f"{path} cannot be read; choose another cache_dir") from None
        except Exception as error:  # a corrupt file can raise any exception
            if is_out_of_memory(error):
                raise
            print(f"{path} is corrupt; rebuilding it", file=sys.stderr)
    content = make()
    with writing(f"cache_dir={path.parent}", "; choose another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent, older_than=3600)
        with atomic_writer(path) as stream:
            torch.save(content, stream)
    return read(content)
