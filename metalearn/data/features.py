"""Feature vectors with labels, in an npz or CSV file."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import torch

from metalearn.config.fields import at_least, setting
from metalearn.data.base import Dataset
from metalearn.data.class_splits import split_classes
from metalearn.data.classes import ClassData, class_indices
from metalearn.data.tables import read_csv
from metalearn.system.errors import UserError, first_line
from metalearn.tasks.store import ArrayStore, ClassView


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features(Dataset):
    """Vectors of a CSV file with a column `label`, or of an npz file with features and labels."""

    path: str = setting()
    split: str = setting()
    split_seed: int = setting()
    fractions: list[float] = at_least(0)

    def files(self, data_dir: Path) -> list[Path]:
        return [data_dir / Path(self.path).expanduser()]

    def open(self, data_dir: Path, cache_dir: Path, device: torch.device) -> ClassData:
        path = self.files(data_dir)[0]
        if not path.is_file():
            raise UserError(
                f"dataset.path={self.path}: there is no file {path}; bring {self.by_hand}"
            )
        try:
            x, labels = _read_npz(path) if path.suffix == ".npz" else _read_csv(path)
            if x.ndim != 2 or labels.shape != x.shape[:1]:
                raise ValueError(f"features are {list(x.shape)}, labels {list(labels.shape)}")
            if not (is_finite := np.isfinite(x).all(1)).all():
                raise ValueError(f"row {int(is_finite.argmin()) + 1} of the features is not finite")
        except UserError:
            raise
        except Exception as error:  # NumPy raises errors of many kinds for a corrupt file
            raise UserError(f"{path} cannot be read: {first_line(error)}") from None
        names, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
        x = x[np.argsort(numbers, kind="stable")]
        known = [str(name) for name in names]
        splits = split_classes(self.split, known, self.fractions, self.split_seed, str(path))
        indices = class_indices(known, counts.tolist(), splits, device)
        views = {split: ClassView(index) for split, index in indices.items()}
        digest = hashlib.sha256(x.tobytes() + repr((x.shape, known, counts.tolist())).encode())
        store = ArrayStore(torch.from_numpy(x).to(device))
        return ClassData(dict.fromkeys(views, store), views, digest.hexdigest()[:16])


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as content:
        if not {"features", "labels"} <= set(content):
            raise ValueError(f"it should hold features and labels, not {', '.join(content)}")
        return content["features"].astype(np.float32), content["labels"]


def _read_csv(path: Path) -> tuple[np.ndarray, np.ndarray]:
    rows = read_csv(path)
    header = [cell.strip().lower() for cell in rows.pop(0)] if rows else []
    if "label" not in header:
        raise ValueError("the first row should name the columns, one of them label")
    place = header.index("label")
    for number, row in enumerate(rows, 2):
        if len(row) != len(header) or not row[place]:
            raise ValueError(f"row {number} has no label, or not {len(header)} cells")
    labels = np.array([row.pop(place) for row in rows])
    return np.array(rows, np.float64).astype(np.float32), labels
