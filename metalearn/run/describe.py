"""Describe a dataset: where it comes from, what is in it, and samples of it.

Legend: T tasks, N classes of a task, M support examples, Q queries.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metalearn.config import choices, composition
from metalearn.config.checking import check_config
from metalearn.config.components import make
from metalearn.config.schema import RunConfig
from metalearn.data.base import Dataset, OpenDataset
from metalearn.data.classes import ClassData
from metalearn.data.images import ImageDataset
from metalearn.run.parts import cache_folder, data_folder, device_of, shapes_of
from metalearn.system.errors import UserError
from metalearn.tasks.ranges import varied
from metalearn.tasks.sampling import TaskSource
from metalearn.tasks.store import ImageStore

_SPLITS = ("train", "val", "test")


class NumberedTexts:
    """A tokenizer whose token is the number of a text, which gives back the text."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    @property
    def vocabulary(self) -> int:
        """Return the number of texts so far, and one more for padding."""
        return len(self.texts) + 1

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return a token for each text, int64 [I, 1]."""
        self.texts.extend(texts)
        return torch.arange(self.vocabulary - len(texts), self.vocabulary)[:, None]


#: Examples of one class: "class", its name; "examples" by part, "support", "query", or "" for those
#: of a split, each an image, float [C, H, W] in [0, 1], a text, or a vector; "counts" of each part,
#: of which the examples may be fewer.
Row = dict[str, Any]


class Described:
    """An opened dataset and what can be said about it.

    `split` is that of episodes; "all" for the classes of all splits. Raise UserError for missing or
    corrupt data, or an unknown split.
    """

    def __init__(self, settings: RunConfig, split: str = "test") -> None:
        if split not in (*_SPLITS, "all"):
            raise UserError(f"split={split}: should be train, val, test or all")
        self.settings, self.split, self.texts = settings, split, NumberedTexts()
        self.dataset: Dataset = make(settings.dataset, "dataset", tokenizer=self.texts)
        self.data: OpenDataset = self.dataset.open(
            data_folder(settings), cache_folder(settings), device_of(settings.device)
        )
        if split == "all":
            if not isinstance(self.data, ClassData):
                raise UserError("split=all: this dataset has no classes; use split=test")
            self.data = self.data.with_split("all")

    @property
    def is_ink(self) -> bool:
        """Return True if images are drawn in dark ink, which is 1 in their values."""
        return isinstance(self.dataset, ImageDataset) and self.dataset.pen is not None

    def summary(self) -> dict[str, Any]:
        """Return the inputs, the hash, and the classes and examples of each split."""
        inputs = self.data.inputs
        shown = {"kind": inputs.kind, "shape": list(inputs.shape)}
        facts: dict[str, Any] = {
            "inputs": {"kind": "texts"} if self.texts.texts else shown,
            "content_hash": self.data.content_hash,
            "splits": {},
        }
        if self.dataset.target == "class":
            splits = dict.fromkeys((*_SPLITS, self.split))
            facts["splits"] = {split: self._split(split) for split in splits}
            return facts
        task = self._source().draw(0, 1)
        what = (inspect.getdoc(type(self.dataset)) or "").partition("\n")[0]
        facts["task"] = (
            f"{what} A task has {task.support.x.shape[1]} support examples and "
            f"{task.query.x.shape[1]} queries, with inputs of shape {list(inputs.shape)} and "
            f"targets of shape {list(task.support.y.shape[2:])}."
        )
        return facts

    def _split(self, split: str) -> dict[str, Any]:
        names = self.data.class_names(split)
        facts: dict[str, Any] = {"classes": len(names), "names": list(names)}
        if (count := self.data.num_classes(split)) != len(names):
            facts["classes_with_rotations"] = count
        if isinstance(self.data, ClassData):
            counts = self.data.views[split].index.counts
            facts |= {
                "examples": int(counts.sum()),
                "smallest_class": int(counts.min()),
                "largest_class": int(counts.max()),
            }
        return facts

    def rows(self, split: str, classes: int, examples: int) -> list[Row]:
        """Return the first examples of some classes of a split, evenly spaced in its list.

        [] for a dataset whose inputs are not addressed by class.
        """
        if not isinstance(self.data, ClassData):
            return []
        index, store = self.data.views[split].index, self.data.stores[split]
        number = min(classes, len(index.names))
        rows = []
        for place in (round(one * len(index.names) / number) for one in range(number)):
            count = int(index.counts[place])
            x = store.load(index.rows[place, : min(count, examples)])
            if not isinstance(store, ImageStore):
                x = store.normalise(x)
            row = {"class": index.names[place], "examples": {"": self._shown(x)}}
            rows.append({**row, "counts": {"": count}})
        return rows

    def episode(self, number: int = 0) -> list[Row]:
        """Return an episode, class by class; raise UserError if the split is too small for it."""
        source = self._source()
        task, classes = source.draw(number, 1), source.classes(number, 1)
        if classes is None:
            return []
        names = self.data.class_names(self.split)
        rows = []
        for label, place in enumerate(classes[0].tolist()):
            parts = {
                part: self._shown(self._in_units(own.x[0][own.y[0] == label]))
                for part, own in (("support", task.support), ("query", task.query))
            }
            counts = {part: len(own) for part, own in parts.items()}
            rows.append({"class": names[place % len(names)], "examples": parts, "counts": counts})
        return rows

    def _source(self) -> TaskSource:
        shape, ranges = shapes_of(self.settings.episode, "episode")
        seed = self.settings.episode_seed
        return varied(self.data.episodes(self.split, shape, seed), ranges, self.split, seed)

    def _in_units(self, x: Tensor) -> Tensor:
        """Undo the standardisation of images."""
        if not (values := self.data.standardisation):
            return x
        shift, scale = (x.new_tensor(values[name]).view(-1, 1, 1) for name in ("shift", "scale"))
        return x / scale + shift

    def _shown(self, x: Tensor) -> list[Any]:
        if self.texts.texts:
            return [self.texts.texts[number - 1] for number in x[:, 0].tolist()]
        return list(x.cpu())


def origin(name: str, dataset: Dataset, settings: RunConfig) -> dict[str, Any]:
    """Return where a dataset comes from, and whether its files are present, as plain data."""
    folder = data_folder(settings)
    files = dataset.files(folder)
    state = "downloaded when first used" if dataset.addresses else "by hand"
    if not files or dataset.is_present(folder):
        state = "present" if files else "needs no files"
    return {
        "dataset": name,
        "description": choices.options("dataset").get(name, ""),
        "source": dataset.source,
        "licence": dataset.licence,
        "state": state,
        "files": [str(path) for path in files],
        "addresses": dataset.addresses,
        "by_hand": dataset.by_hand,
    }


def origins(settings: RunConfig) -> list[dict[str, Any]]:
    """Return `origin` of every dataset, with the settings of its file."""
    known = []
    for name in choices.options("dataset"):
        try:
            values = choices.stored_values("dataset", name)
        except UserError:  # it refers to other settings, so it has to be composed with them
            values = check_config(composition.compose_config([f"dataset={name}"])).dataset
        known.append(origin(name, make(values, "dataset"), settings))
    return known
