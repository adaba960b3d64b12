"""Texts with labels: published sets of intents and sentiments, and your own CSV files."""

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from metalearn.config.fields import at_least, given_by_run, setting
from metalearn.data.base import Dataset
from metalearn.data.class_splits import check_known, check_splits, random_split, split_file
from metalearn.data.classes import ClassData, class_indices
from metalearn.data.tables import read_csv, table
from metalearn.system.download import fetch
from metalearn.system.errors import UserError, first_line, prefixed
from metalearn.tasks.distractors import DistractedSampler
from metalearn.tasks.sampling import EpisodeSampler, Shape
from metalearn.tasks.store import ArrayStore, Augmentation, ClassView
from metalearn.tasks.types import Tokenizer

#: Names of the columns of a file of texts.
COLUMNS = {
    "text": ("text", "sentence", "utterance", "query"),
    "label": ("label", "category", "intent", "class"),
    "domain": ("domain",),
}
_PUBLISHED = ("clinc150", "banking77", "hwu64")


class Row(NamedTuple):
    """A text with its label, and perhaps its domain."""

    text: str
    label: str
    domain: str


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """Yield the content of a JSON file; an error in the block is that of the file."""
    try:
        yield json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)})") from None


def read_rows(path: Path) -> list[Row]:
    """Read a CSV file (text, label, perhaps domain) or JSON {part: [[text, label], …]}.

    Raise UserError if it cannot be read, or a row has no text or no label.
    """
    if path.suffix == ".json":
        with _reading(path) as sets:
            return [
                Row(str(text), str(label), "") for part in sets.values() for text, label in part
            ]
    rows, first = table(path, read_csv(path), COLUMNS, required=2)
    for number, row in enumerate(rows, first):
        if not row["text"] or not row["label"]:
            missing = "label" if row["text"] else "text"
            raise UserError(f"{path}: row {number} has no {missing}; complete or remove it")
    return [Row(**row) for row in rows]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(Dataset):
    """Texts with labels in one or several files.

    A class is a label; where domains share labels, a label of a domain. A text that a class has
    twice is left out.

    `path` is a file, or the folder of `parts`, in which domains.json maps a domain to its labels.
    The split is "random"; "domains" (no domain is in two splits); "clinc150/1" to "hwu64/5", the
    folds of Dopierre et al. (2021); or a JSON file as for `Folder`. Texts of the label
    `distractors`, such as "oos", are the distractors of episodes (`episode.distractors`), each in
    one split; without it, distractors are other classes.
    """

    path: str = setting()
    parts: list[str] = setting(default=[])
    urls: dict[str, str] = setting(default={})
    md5: dict[str, str] = setting(default={})
    split: str = setting()
    split_seed: int = setting()
    fractions: list[float] = at_least(0)
    domains: dict[str, str] = setting(default={})
    distractors: str = setting(default="")
    tokenizer: Tokenizer | None = given_by_run(None)

    @property
    def addresses(self) -> list[str]:
        return list(self.urls.values())

    def files(self, data_dir: Path) -> list[Path]:
        root = data_dir / Path(self.path).expanduser()
        return [root / name for name in self.parts] or [root]

    def open(self, data_dir: Path, cache_dir: Path, device: torch.device) -> ClassData:
        if self.tokenizer is None:
            raise UserError(
                "dataset: has texts, which this backbone does not take; use "
                "backbone=text_transformer, text_encoder or bag_of_ngrams"
            )
        texts, domain_of = self._read(self.files(data_dir))
        content = repr(sorted(texts.items())).encode("utf-8", "surrogatepass")
        digest = hashlib.sha256(content).hexdigest()[:16]
        strange: list[str] = []
        if self.distractors:
            strange = texts.pop(self.distractors, [])
            domain_of.pop(self.distractors, None)
            if not strange:
                raise UserError(
                    f"dataset.distractors={self.distractors}: {self.path} has no such label"
                )
        splits = self._splits(sorted(texts), domain_of)
        names = [name for chosen in splits.values() for name in chosen]
        known = [text for name in names for text in texts[name]]
        tokens = self.tokenizer(known + strange)
        store = ArrayStore(tokens.to(device), self.tokenizer.vocabulary)
        counts = [len(texts[name]) for name in names]
        groups = domain_of if any(domain_of.values()) else {}
        indices = class_indices(names, counts, splits, device, groups)
        views = {split: ClassView(index) for split, index in indices.items()}
        stores = dict.fromkeys(views, store)
        if not strange:
            return ClassData(stores, views, digest)
        numbers = [str(number) for number in range(len(known), len(known) + len(strange))]
        parts = random_split(numbers, self.fractions, self.split_seed)
        pools = {
            split: torch.tensor(sorted(map(int, some)), dtype=torch.int64, device=device)
            for split, some in parts.items()
        }
        data = _DistractedData(stores, views, digest)
        return data.changed(pools=pools, label=self.distractors)

    def _read(self, paths: list[Path]) -> tuple[dict[str, list[str]], dict[str, str]]:
        """Return the texts and the domain of each class."""
        rows: list[Row] = []
        known: dict[str, str] = {}
        for path in paths:
            if not path.exists() and path.name in self.urls:
                fetch(self.urls[path.name], path.parent, self.md5[path.name])
            if not path.exists():
                raise UserError(
                    f"dataset.path={self.path}: there is no {path}; bring it there: {self.by_hand}"
                )
            if path.name == "domains.json":
                with _reading(path) as content:
                    known = {label: domain for domain, some in content.items() for label in some}
            else:
                rows += read_rows(path)
        if not rows:
            raise UserError(f"dataset.path={self.path} has no texts")
        domains: dict[str, set[str]] = defaultdict(set)
        for row in rows:
            domains[row.label].add(row.domain)
        texts: dict[str, list[str]] = defaultdict(list)
        for row in dict.fromkeys(rows):
            name = f"{row.domain}/{row.label}" if len(domains[row.label]) > 1 else row.label
            texts[name].append(row.text)
            known.setdefault(name, row.domain)
        if repeated := len(rows) - sum(map(len, texts.values())):
            logging.getLogger(__name__).warning(
                f"{self.path}: {repeated} repeated texts are left out"
            )
        return texts, known

    def _splits(self, names: list[str], domain_of: dict[str, str]) -> dict[str, list[str]]:
        published, _, fold = self.split.partition("/")
        if self.split == "random":
            return random_split(names, self.fractions, self.split_seed)
        if self.split == "domains":
            chosen = {
                split: [name.strip() for name in given.split(",")]
                for split, given in self.domains.items()
            }
            domains = sorted(set(domain_of.values()))
            if domains == [""]:
                raise UserError(f"dataset.split=domains: {self.path} has no column domain")
            chosen = chosen or random_split(domains, self.fractions, self.split_seed)
            if chosen.keys() != {"train", "val", "test"}:
                raise UserError("dataset.domains should name domains for train, val and test")
            check_splits(chosen, f"dataset.domains={self.domains}", "domain")
            check_known(chosen, domains, f"dataset.domains={self.domains}", self.path, "domain")
            splits = {
                split: [name for name in names if domain_of[name] in some]
                for split, some in chosen.items()
            }
        elif published in _PUBLISHED:
            path = Path(__file__).parent / f"splits/{published}.json"
            folds = json.loads(path.read_text())
            if fold not in folds:
                raise UserError(f"dataset.split={self.split}: should be {published}/1 to 5")
            splits = folds[fold]
        else:
            splits = split_file(Path(self.split).expanduser())
        check_known(splits, names, f"dataset.split={self.split}", self.path)
        return splits


class _DistractedData(ClassData):
    """Classes, and inputs of none of them: rows int64 [R] of each split."""

    pools: dict[str, torch.Tensor]
    label: str

    def with_split(self, split: str) -> ClassData:
        names = list(self.pools) if split == "all" else split.split("+")
        own = torch.cat([self.pools[name] for name in names])
        return super().with_split(split).changed(pools={**self.pools, split: own})

    def protocol(self, split: str) -> dict[str, object]:
        digest = hashlib.sha256(repr(self.pools[split].tolist()).encode()).hexdigest()[:16]
        return super().protocol(split) | {"distractor_label": self.label, "distractor_rows": digest}

    def episodes(
        self, split: str, shape: Shape, seed: int, augment: Augmentation | None = None
    ) -> EpisodeSampler:
        plain = super().episodes(split, dataclasses.replace(shape, distractors=0), seed, augment)
        if not shape.distractors:
            return plain
        with prefixed(f"{split} episodes"):
            return DistractedSampler(**vars(plain) | {"shape": shape}, pool=self.pools[split])
