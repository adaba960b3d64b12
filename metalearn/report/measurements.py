"""Read the measurements of runs: their own tests and their evaluations."""

import dataclasses
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metalearn.config import checking, roles
from metalearn.report import stats
from metalearn.report.folder import RunFolder
from metalearn.report.result import Result, hash_of
from metalearn.report.scores import read_scores
from metalearn.system.errors import UserError, visible
from metalearn.system.reading import read_yaml


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One test of one run."""

    folder: Path
    name: str
    settings: dict[str, Any]  # those that distinguish its method from others, by dotted name
    result: Result
    variant: str  # how the adaptation differs from the run's own test, or ""
    dataset: dict[str, Any]  # settings of the tested dataset, as far as the run's files have them
    minutes: float  # of the training
    hardware: str  # of the training
    scores: Tensor  # of each episode, float64 [E]

    @property
    def data(self) -> str:
        """Return the name of the tested dataset."""
        return dataset_name(self.dataset)


@dataclasses.dataclass(frozen=True)
class Cell:
    """Measurements of one method under one protocol, combined."""

    mean: float  # over episodes
    ci95: float  # half-width of its 95% interval
    by_seed: list[float]  # mean of each seed, over the runs that repeat it
    scores: Tensor  # of each episode, averaged over seeds, [E]

    @staticmethod
    def of(measurements: list[Measurement]) -> "Cell":
        """Combine measurements; a seed that was run twice counts once."""
        by_seed: dict[int, list[Tensor]] = defaultdict(list)
        for one in measurements:
            by_seed[one.result.seed].append(one.scores)
        means = [torch.stack(scores).mean(0) for scores in by_seed.values()]
        scores = torch.stack(means).mean(0)
        own = stats.estimate(scores)
        return Cell(own.mean, own.ci95, [mean.mean().item() for mean in means], scores)

    @property
    def seeds_ci95(self) -> float | None:
        """Half-width of the 95% interval over seeds, if there are several."""
        means = torch.tensor(self.by_seed, dtype=torch.float64)
        return stats.estimate(means).ci95 if len(means) > 1 else None


def runs_in(folders: list[Path]) -> tuple[list[Path], dict[Path, str]]:
    """Find runs: the folders themselves, or those below them; links below them are not followed.

    Return the folders of finished runs, and why each other folder is left out.
    """
    finished: set[Path] = set()
    others: dict[Path, str] = {}
    waiting = list(folders)
    while waiting:
        folder = waiting.pop()
        files = RunFolder(folder)
        try:
            if files.is_finished:
                finished.add(folder)
                continue
            if files.is_started or files.error.exists():
                others[folder] = "has no result; its run failed or is running"
            with os.scandir(folder) as entries:
                waiting += [
                    folder / one.name for one in entries if one.is_dir(follow_symlinks=False)
                ]
        except OSError as error:
            others[folder] = f"cannot be read ({error.strerror})"
    return sorted(finished), dict(sorted(others.items()))


def measurements_of(folder: Path) -> Iterator[Measurement]:
    """Yield the run's own test, and its evaluations that differ from it.

    Raise UserError if the run is not readable, or scores and result disagree.
    """
    files = RunFolder(folder)
    own = files.read_result()
    config = read_yaml(files.config)
    try:
        settings, dataset = identity(config), dict(config["dataset"])
    except (KeyError, TypeError, ValueError, AttributeError):  # foreign: not the settings of a run
        raise UserError(f"{files.config} does not hold the settings of a run") from None
    # A run is named by method and dataset; "folder" alone would not say which.
    short, words = own.name.rpartition(" ")[2], dataset_name(dataset)
    name = own.name + (words.removeprefix(short) if words.startswith(f"{short} ") else "")
    # A result, its scores, and how its adaptation differs. A model has no scores of its own test.
    tests = [(own, files.scores, "")]
    if has_no_scores := files.best == files.model and not files.scores.exists():
        tests = []
    for path in sorted(files.evaluations.glob("*.json")):
        result = Result.read(path)
        variant = path.stem.partition("-")[2]
        if variant or has_no_scores or result.protocol_id != own.protocol_id:
            tests.append((result, files.evaluation_scores(path), variant))
    if not tests:
        raise UserError(
            f"{folder} has no scores of episodes; to test it: metalearn evaluate {folder}"
        )
    for result, scores_file, variant in tests:
        scores = read_scores(scores_file)
        _check_scores(scores_file, scores, result)
        result = dataclasses.replace(result, seed=own.seed)
        tested = _tested_dataset(dataset, result.evaluation)
        minutes, hardware = own.seconds / 60, own.hardware
        yield Measurement(
            folder, name, settings, result, variant, tested, minutes, hardware, scores
        )


def dataset_name(settings: Mapping[str, Any]) -> str:
    """Return the name of a dataset with these settings: "glyphs", "cifar_fs", "folder letters"."""
    kind = str(settings.get("_target_", "")).rpartition(".")[2].lower()
    name, path = str(settings.get("name") or kind), settings.get("path")
    return f"{name} {Path(str(path)).name}" if path and name == kind else name


def _tested_dataset(own: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the run's own dataset, or of the one that an evaluation chose."""
    settings = own
    parts = [str(word).partition("=") for word in evaluation.get("overrides", [])]
    for key, _, value in sorted(parts, key=lambda part: part[0] != "dataset"):
        if key == "dataset":
            settings = {"_target_": str(evaluation.get("dataset")), "name": value}
        elif key.startswith("dataset."):
            settings = {**settings, key.removeprefix("dataset."): value.strip("'\"")}
    return settings


def _check_scores(file: Path, scores: Tensor, result: Result) -> None:
    test, protocol = result.test, result.protocol
    if result.protocol_id != hash_of(protocol) or protocol.get("episodes") != test.episodes:
        raise UserError(f"{file.parent}: protocol {result.protocol_id} is not that of its result")
    if len(scores) != test.episodes:
        raise UserError(f"{file} has {len(scores)} scores, not {test.episodes}")
    mean = scores.mean().item()
    if abs(mean - test.mean) > 1e-4 * max(1.0, abs(test.mean)):
        raise UserError(f"{file} has mean {mean:.4f}, the result {test.mean:.4f}")


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that distinguish a method from others, by dotted name."""
    complete = checking.complete(config, is_strict=False)
    known = roles.roles(complete, is_strict=False)
    return {
        key: visible(value) if isinstance(value, str) else value
        for key, value in checking.leaves(complete).items()
        if roles.distinguishes_methods(key, known)
    }
