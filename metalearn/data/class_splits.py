"""Split the classes of a dataset: at random, as published, or as a file says."""

import itertools
import json
from collections import Counter
from pathlib import Path

from metalearn.system.errors import UserError
from metalearn.tasks import prng

_PUBLISHED = Path(__file__).parent / "splits"


def seeded_split(names: list[str], sizes: dict[str, int], seed: int) -> dict[str, list[str]]:
    """Draw the classes of each split, without replacement, from the sorted names."""
    names = sorted(names)
    order = prng.permutation(prng.key_of(seed), len(names)).tolist()
    chosen: dict[str, list[str]] = {}
    start = 0
    for split, size in sizes.items():
        chosen[split] = [names[index] for index in order[start : start + size]]
        start += size
    return chosen


def random_split(names: list[str], fractions: list[float], seed: int) -> dict[str, list[str]]:
    """Draw the classes of each split as `seeded_split` does, by fractions of their number.

    Train gets the rounding remainder.
    """
    if len(fractions) != 3 or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(
            f"dataset.fractions={list(fractions)} should be three fractions (train, val, test) "
            "that sum to 1"
        )
    val, test = (round(len(names) * fraction) for fraction in fractions[1:])
    sizes = {"train": len(names) - val - test, "val": val, "test": test}
    return seeded_split(names, sizes, seed)


def split_classes(
    split: str, names: list[str], fractions: list[float], seed: int, owner: str
) -> dict[str, list[str]]:
    """Return the names of the classes of each split.

    The split is "random", the name of a published one, or a file as for `split_file`. Raise
    UserError if it names a class that does not exist; `owner` says in the message what has them.
    """
    if split == "random":
        return random_split(names, fractions, seed)
    splits = split_file(published_split(split) or Path(split).expanduser())
    check_known(splits, names, f"dataset.split={split}", owner)
    return splits


def published_split(name: str) -> Path | None:
    """Return the file of a published split that comes with the package, or None."""
    path = _PUBLISHED / f"{name}.json"
    return path if path.is_file() else None


def published_superclasses(names: list[str]) -> dict[str, str]:
    """Return the superclass of each class, if a published split has them all; else {}."""
    for path in sorted(_PUBLISHED.glob("*.json")):
        entries = [one for some in json.loads(path.read_text()).values() for one in some]
        known = {one[-1]: one[0] for one in entries if isinstance(one, list)}
        if known.keys() >= set(names):
            return known
    return {}


def split_file(path: Path) -> dict[str, list[str]]:
    """Read the names of the classes of each split; raise UserError if they overlap.

    A class may be written with its superclass, as [superclass, class].
    """
    expected = 'JSON with {"train": [class, ...], "val": [...], "test": [...]}'
    try:
        splits = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"dataset.split={path} should be the name of a split, or a file of {expected} ({error})"
        ) from None
    lists = isinstance(splits, dict) and all(isinstance(names, list) for names in splits.values())
    if not lists or set(splits) != {"train", "val", "test"}:
        raise UserError(f"dataset.split={path} should be {expected}")
    splits = {
        split: [name[-1] if isinstance(name, list) and name else name for name in names]
        for split, names in splits.items()
    }
    check_splits(splits, f"dataset.split={path}")
    return splits


def check_splits(splits: dict[str, list[str]], owner: str, what: str = "class") -> None:
    """Raise UserError if a class, or something else, is twice in a split, or in two splits."""
    for split, names in splits.items():
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(f"{owner} has {what} '{repeated[0]}' twice in {split}")
    for first, second in itertools.combinations(splits, 2):
        others = set(splits[second])
        if shared := [name for name in splits[first] if name in others]:
            raise UserError(f"{owner} has {what} '{shared[0]}' in both {first} and {second}")


def check_known(
    splits: dict[str, list[str]], names: list[str], setting: str, owner: str, what: str = "class"
) -> None:
    """Raise UserError if the splits of a setting name a class, or something else, not in names."""
    if unknown := [name for some in splits.values() for name in some if name not in names]:
        raise UserError(f"{setting} names {what} '{unknown[0]}', which {owner} does not have")
