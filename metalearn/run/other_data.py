"""Tests on data other than a run's own: which, in what form, and whether it was trained on them."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig

from metalearn.config import choices, components, composition, paths
from metalearn.config.checking import check_config
from metalearn.config.schema import RunConfig
from metalearn.data.base import OpenDataset
from metalearn.data.classes import ClassData
from metalearn.run.build import Run, open_data
from metalearn.run.pairings import target_name
from metalearn.run.parts import algorithm_of, data_folder, device_of
from metalearn.system.errors import UserError, first_line, prefixed

SPLITS = ("train", "val", "test", "all", "train+test")
#: Number of names of classes in a message.
_MAX_NAMES = 30


class Target(NamedTuple):
    """A dataset to test on: as it was given, the settings that choose it, and perhaps its split."""

    label: str
    overrides: list[str]
    split: str | None

    @staticmethod
    def of(word: str) -> "Target":
        """Return the target that a name, or a folder or zip of images, describes.

        `:all` or another split may follow.
        """
        name, _, split = word.rpartition(":")
        if split not in SPLITS:
            name, split = word, ""
        path = os.path.expanduser(name)
        is_known = name in choices.options("dataset")
        if is_known or not ("/" in name or os.path.exists(path)):
            return Target(name, [f"dataset={name}"], split or None)
        overrides = ["dataset=folder", f"dataset.path={composition.quoted(path)}"]
        return Target(Path(path).name, overrides, split or None)


class Inputs(NamedTuple):
    """The inputs of a trained network: shape, shift and scale of each channel; None if unknown."""

    shape: tuple[int, ...] | None
    standardisation: dict[str, list[float]] | None


def apply_target(config: DictConfig, overrides: list[str], inputs: Inputs) -> list[str]:
    """Return overrides, and with a chosen dataset the image size of the network unless given."""
    keys = {word.partition("=")[0].lstrip("+") for word in overrides}
    if "dataset" not in keys or "dataset.image_size" in keys or len(inputs.shape or ()) != 3:
        return overrides
    chosen = [word for word in overrides if word.startswith("dataset=")]
    if "image_size" not in composition.apply_overrides(config, chosen).dataset:
        return overrides
    assert inputs.shape is not None
    return [*overrides, f"dataset.image_size={inputs.shape[-1]}"]


def check_kind(before: RunConfig, after: RunConfig) -> None:
    """Raise UserError if a dataset has other tasks than the run has learned."""
    old, new = (
        components.component(settings.dataset, "dataset").target for settings in (before, after)
    )
    if old != new:
        raise UserError(
            f"dataset: the run learned {target_name(old)}, but this dataset has {target_name(new)}"
        )


def open_tested(settings: RunConfig, split: str, inputs: Inputs) -> OpenDataset:
    """Open the data of a test in the form that the network was trained on, or raise UserError.

    Images have the channels of the network's (colours become grey by luma), and the run's
    normalisation: the same function of a pixel's value as in training.
    """
    algorithm = algorithm_of(settings, is_restored=True)
    shape, standardisation = inputs
    channels = shape[0] if shape and len(shape) == 3 else None
    # Statistics of these images would be replaced.
    raw = {} if standardisation is None else {"raw": True}
    data = open_data(settings, algorithm, device_of(settings.device), channels=channels, **raw)
    if isinstance(data, ClassData) and standardisation is not None:
        data = data.standardised(standardisation)
    if split in ("all", "train+test"):
        if not isinstance(data, ClassData):
            raise UserError(f"split={split}: this dataset has no classes; use split=test")
        data = data.with_split(split)
    return data


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Number of tested examples of each class that a run was trained or validated on."""

    trained: dict[str, int]
    validated: dict[str, int]
    sizes: dict[str, int]  # of all tested examples

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """The examples of each class, as plain data."""
        return {"trained": self.trained, "validated": self.validated}

    def __str__(self) -> str:
        examples = sum(self.trained.values()) + sum(self.validated.values())
        count = len({*self.trained, *self.validated})
        parts = []
        for what, found in (("trained", self.trained), ("validated", self.validated)):
            whole = [name for name, number in found.items() if number == self.sizes[name]]
            rest = [name for name in found if name not in whole]
            words = [f"all of {len(whole)}: {_named(whole)}"] if whole else []
            if rest:
                words.append(f"{sum(found[name] for name in rest):,} examples of {_named(rest)}")
            if words:
                parts.append(f"{what}: {' and '.join(words)}")
        return (
            f"{examples:,} of {sum(self.sizes.values()):,} examples were trained or validated on, "
            f"in {count} of {len(self.sizes)} classes ({'; '.join(parts)})"
        )


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} others" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def overlap(own: OpenDataset, tested: OpenDataset, split: str, by_name: bool) -> Overlap | None:
    """Find the tested examples that are in a run's own training or validation data; None for none.

    `by_name`: classes with the same name are the same class, because both data have one source.
    """
    if not (isinstance(own, ClassData) and isinstance(tested, ClassData)):
        return None
    index = tested.views[split].index
    counts = dict(zip(index.names, index.counts.tolist(), strict=True))
    hashes = tested.class_hashes(split)
    shared: list[dict[str, int]] = []
    for part in ("train", "val"):
        used = torch.cat([torch.zeros(0, dtype=torch.int64), *own.class_hashes(part).values()])
        is_used = {name: torch.isin(each, used) for name, each in hashes.items()}
        same = {name: int(each.sum()) for name, each in is_used.items()}
        hashes = {name: each[~is_used[name]] for name, each in hashes.items()}  # count each once
        if by_name:
            same |= {name: counts[name] for name in own.class_names(part) if name in counts}
        shared.append({name: count for name, count in same.items() if count})
    return Overlap(shared[0], shared[1], counts) if any(shared) else None


def check_overlap(
    before: RunConfig, after: RunConfig, own: OpenDataset, tested: OpenDataset, split: str
) -> Overlap | None:
    """Return the overlap, or None if there is none; raise UserError unless it is allowed."""
    shared = overlap(own, tested, split, has_same_source(before, after))
    if shared and after.test.overlap == "refuse":
        raise UserError(
            f"dataset: {shared}; choose a split without them, or test.overlap=allow, which the "
            "result records"
        )
    return shared


def has_same_source(before: RunConfig, after: RunConfig) -> bool:
    """Return True if two datasets read the same files."""
    return all(before.dataset.get(key) == after.dataset.get(key) for key in ("_target_", "path"))


def is_trained(config: RunConfig) -> bool:
    """Return True if a run's weights may come from its training classes."""
    return config.train.steps > 0 or config.train.start is not None


def lineage(config: RunConfig) -> list[RunConfig]:
    """Return a run and those that it started from: the first one trained on each dataset."""
    found: list[RunConfig] = []
    while True:
        if is_trained(config) and all(config.dataset != one.dataset for one in found):
            found.append(config)
        if config.train.start is None:
            return found
        with prefixed("train.start"):
            config = check_config(composition.load_config(Path(config.train.start)))


def check_start(run: Run) -> None:
    """Raise UserError if a run tests what the runs that it started from were trained on."""
    with prefixed("train.start"):
        for before in lineage(run.config):
            if before.dataset != run.config.dataset:
                check_overlap(before, run.config, open_own(before, run.config), run.data, "test")


def open_own(before: RunConfig, after: RunConfig) -> OpenDataset:
    """Open the data that a run was trained on; raise UserError if they cannot be read."""
    own = dataclasses.replace(
        before, data_dir=after.data_dir, cache_dir=after.cache_dir, device="cpu"
    )
    try:
        algorithm = algorithm_of(own, is_restored=True)
        return open_data(own, algorithm, torch.device("cpu"), raw=True)
    except UserError as error:
        raise UserError(
            "dataset: whether the run was trained on these examples cannot be checked without its "
            f"own data ({first_line(error)})"
        ) from None


def fitting_way(
    settings: RunConfig, data: OpenDataset, split: str, is_given: bool
) -> int | list[int]:
    """Return the number of classes of an episode: that of the settings, or all if there are fewer.

    Raise UserError if the number of ways is part of the weights; if it is given by the user, the
    sampler reports it.
    """
    way = settings.episode.way
    largest = way[-1] if isinstance(way, list) else way
    most = data.views[split].max_way if isinstance(data, ClassData) else largest
    if largest <= most or is_given:
        return way
    if algorithm_of(settings, is_restored=True).fixed_way:
        raise UserError(
            f"dataset: its {split} split has {most} classes, but the run distinguishes {way}, the "
            "number of ways is part of its weights"
        )
    return [min(way[0], most), most] if isinstance(way, list) else most


def check_targets(run: Run, config: DictConfig, words: Sequence[str]) -> None:
    """Raise UserError, before any training, for a dataset that the run cannot be tested on."""
    if words and run.processes.size > 1:
        raise UserError(
            "test_dataset: requires a single process; test later with metalearn evaluate"
        )
    inputs = Inputs(run.spec.input_shape, run.standardisation)
    for word in words:
        target = Target.of(word)
        with prefixed(f"test_dataset={word}"):
            overrides = apply_target(config, target.overrides, inputs)
            changed: Any = composition.apply_overrides(config, overrides)
            paths.make_absolute(changed, overrides, data_folder(run.config))
            after = check_config(changed)
            check_kind(run.config, after)
            split = target.split or "test"
            data = open_tested(after, split, inputs)
            if is_trained(run.config):
                check_overlap(run.config, after, run.data, data, split)
            fitting_way(after, data, split, is_given=False)
