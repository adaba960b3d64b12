"""Layouts of published image sets other than class folders: arrays in files, and lists of labels.

- CIFAR-10 and CIFAR-100: the official batches.
- One file or two for each of train, val and test, pickled or npz: {image_data, class_dict},
  {data, labels}, or {images} or a list of encoded images next to {label_specific}.
- Images in one folder with train.csv, val.csv and test.csv, each with the columns filename, label.
"""

import csv
import functools
import io
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from metalearn.data import archives, files, pickles
from metalearn.data.class_splits import check_splits
from metalearn.data.files import ImageFile
from metalearn.data.images import ClassImages
from metalearn.system.errors import UserError, first_line, is_out_of_memory

_SPLITS = ("train", "val", "test")
#: Batches, file of names, and keys of labels and names.
_CIFAR = (
    (("train", "test"), "meta", "fine_labels", "fine_label_names"),
    (
        (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"),
        "batches.meta", "labels", "label_names",
    ),
)  # fmt: skip
#: Files of one split. Gidaris & Komodakis (2018) also have other images of the training classes.
_OF_SPLIT = re.compile(
    r"(?:^|.*[-_])(train|(?<!train_phase_)(?:val|test))(_images|_images_png|_labels)?"
    r"\.(?:pkl|pickle|npz)"
)
#: Suffixes of what a dataset of images may consist of.
SUFFIXES = files.SUFFIXES | {"", ".meta", ".pkl", ".pickle", ".npz", ".csv"}

#: Images, and the positions of each class's.
_Part = tuple[Sequence[Any], Mapping[str, Any]]
_ToArray = Callable[[Image.Image], np.ndarray]


def containers(root: Path) -> list[Path]:
    """Return the zips in a folder and the folder, or if those have no images, all its archives.

    A file is returned itself; [] if there is nothing.
    """
    if not root.is_dir():
        return [root] if root.is_file() else []
    unpacked = [*sorted(root.glob("*.zip")), root]
    for container in unpacked:
        content = files.list_images(container, SUFFIXES)
        if arrays(content) or any(is_image(file.name) for file in content):
            return unpacked
    return sorted(path for path in root.iterdir() if archives.is_archive(path.name))


def is_image(name: str) -> bool:
    """Return True for the name of an image file."""
    return Path(name).suffix.lower() in files.SUFFIXES


def is_data(name: str) -> bool:
    """Return True for the name of a file that images may come from."""
    is_batch = any(name in batches for batches, *_ in _CIFAR)
    return (
        is_batch or is_image(name) or archives.is_archive(name) or bool(_OF_SPLIT.fullmatch(name))
    )


def arrays(content: list[ImageFile]) -> Callable[[_ToArray], ClassImages] | None:
    """Return the function that reads all images, if they are in arrays; it raises UserError."""
    if any(is_image(file.name) for file in content):
        return None
    named = {PurePosixPath(file.name).name: file for file in content}
    for batches, meta, labels, names in _CIFAR:
        if named.keys() >= {*batches, meta}:
            return functools.partial(
                _read_cifar, [named[name] for name in batches], named[meta], labels, names
            )
    parts: dict[str, list[ImageFile]] = defaultdict(list)
    for name, file in sorted(named.items()):
        match = _OF_SPLIT.fullmatch(name)
        if match and not (match[2] == "_images_png" and name.replace("_png.pkl", ".npz") in named):
            parts[match[1]].append(file)
    return functools.partial(_read_splits, parts) if parts.keys() >= set(_SPLITS) else None


def _read_cifar(
    batches: list[ImageFile], meta: ImageFile, label_key: str, name_key: str, to_array: _ToArray
) -> ClassImages:
    def read() -> list[_Part]:
        parts = [_load(file) for file in batches]
        labels = np.concatenate([part[label_key] for part in parts])
        pixels = np.concatenate([part["data"] for part in parts])
        images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        names = enumerate(_load(meta)[name_key])
        return [(images, {name: np.flatnonzero(labels == label) for label, name in names})]

    return _assembled([(batches[0], read)], to_array)


def _read_splits(parts: dict[str, list[ImageFile]], to_array: _ToArray) -> ClassImages:
    def read(split: str) -> list[_Part]:
        content: dict[str, Any] = {}
        for file in parts[split]:
            loaded = _load(file)
            content |= loaded if isinstance(loaded, Mapping) else {"images": loaded}
        images = _first(content, "image_data", "data", "images")
        if "class_dict" in content:
            return [(images, {str(name): rows for name, rows in content["class_dict"].items()})]
        labels = np.asarray(_first(content, "labels", "label_specific"))
        if len(labels) != len(images):
            raise ValueError(f"{len(images)} images, but {len(labels)} labels")
        texts = content.get("label_specific_str")
        classes = {}
        for label in np.unique(labels):
            # Numbers begin at 0 in each file.
            name = f"{split}/{label}" if labels.dtype.kind in "iu" else str(label)
            classes[str(texts[label]) if texts else name] = np.flatnonzero(labels == label)
        return [(images, classes)]

    reads = [(parts[split][0], functools.partial(read, split)) for split in _SPLITS]
    return _assembled(reads, to_array, _SPLITS)


def _first(content: Mapping[str, Any], *keys: str) -> Any:
    if not (known := [key for key in keys if key in content]):
        raise ValueError(f"it has no {' or '.join(keys)}")
    return content[known[0]]


def _load(file: ImageFile) -> Any:
    with files.opener() as opened, opened(file) as stream:
        if file.name.endswith(".npz"):
            return dict(np.load(stream, allow_pickle=False))
        return pickles.load(stream)


def _assembled(
    reads: Sequence[tuple[ImageFile, Callable[[], list[_Part]]]],
    to_array: _ToArray,
    splits: Sequence[str] = (),
) -> ClassImages:
    """Read parts and convert their images; an error names the file of the part."""
    pixels: list[np.ndarray] = []
    hashes: list[int] = []
    counts: list[int] = []
    names: list[list[str]] = []
    for file, read in reads:
        names.append([])
        try:
            for images, classes in read():
                for name, rows in classes.items():
                    for image in (_image(images[row]) for row in rows):
                        pixels.append(to_array(image))
                        plain = files.plain(image, "white", "RGB")
                        hashes.append(files.pixel_hash(np.asarray(plain)))
                    counts.append(len(rows))
                    names[-1].append(name)
        except Exception as error:  # a corrupt file can raise any
            if is_out_of_memory(error):
                raise
            reason = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
            raise UserError(f"{file} is not a file of images ({reason}); replace it") from None
    of_split = dict(zip(splits, names, strict=False))
    check_splits(of_split, f"{reads[0][0].source}")
    return ClassImages(
        torch.from_numpy(np.stack(pixels)),
        counts,
        [*itertools.chain(*names)],
        splits=of_split,
        hashes=torch.tensor(hashes),
    )


def _image(content: Any) -> Image.Image:
    """Return an image from uint8 [H, W, 3], or from an encoded file as bytes or uint8 [B]."""
    if isinstance(content, np.ndarray) and content.ndim == 3 and content.dtype == np.uint8:
        return Image.fromarray(content)
    encoded = content if isinstance(content, bytes) else np.asarray(content, np.uint8).tobytes()
    return files.open_image(io.BytesIO(encoded))


def by_lists(
    content: list[ImageFile],
) -> tuple[dict[str, list[ImageFile]], dict[str, list[str]]] | None:
    """Return the images and the split of each class, if lists have them and no folders do.

    Raise UserError for a list without a header, with a class of another list, or with an image that
    does not exist.
    """
    images = [file for file in content if is_image(file.name)]
    lists = {PurePosixPath(f.name).stem: f for f in content if f.name.lower().endswith(".csv")}
    if not lists.keys() >= set(_SPLITS) or len({PurePosixPath(f.name).parent for f in images}) > 1:
        return None
    named = {PurePosixPath(file.name).name: file for file in images}
    classes: dict[str, list[ImageFile]] = defaultdict(list)
    splits: dict[str, list[str]] = {}
    for split in _SPLITS:
        with files.opener() as opened, opened(lists[split]) as stream:
            text = stream.read().decode("utf-8-sig", "replace")
        rows = csv.DictReader(io.StringIO(text, newline=""))
        if not {"filename", "label"} <= set(rows.fieldnames or ()):
            first = ",".join(rows.fieldnames or ())
            raise UserError(f"{lists[split]}: the first row should be filename,label, not {first}")
        known = [(row["filename"], row["label"]) for row in rows]
        if absent := [name for name, _ in known if name not in named]:
            raise UserError(
                f"{lists[split]} lists {absent[0]} and {len(absent) - 1} other images that do not "
                f"exist in {lists[split].source}"
            )
        for name, label in known:
            classes[label].append(named[name])
        splits[split] = list(dict.fromkeys(label for _, label in known))
    check_splits(splits, str(lists["train"].source))
    return classes, splits
