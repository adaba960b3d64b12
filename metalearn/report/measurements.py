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
    """One test of one run.

    Attributes:
        folder: The run folder.
        name: Name of the run.
        settings: Settings that distinguish its method from others, by dotted name.
        result: The result of the test.
        variant: How the adaptation differs from the run's own test, or "".
        source: What was tested, if not the run's own test split, or "".
        minutes: Training time.
        hardware: Hardware of the training.
        scores: Score of each episode, float64 [E].
    """

    folder: Path
    name: str
    settings: dict[str, Any]
    result: Result
    variant: str
    source: str
    minutes: float
    hardware: str
    scores: Tensor


@dataclasses.dataclass(frozen=True)
class Cell:
    """Measurements of one method under one protocol, combined.

    Attributes:
        mean: Mean over episodes of the scores.
        ci95: Half-width of its 95% interval.
        by_seed: Mean of each seed, over the runs that repeat it.
        scores: Score of each episode, averaged over seeds, [E].
    """

    mean: float
    ci95: float
    by_seed: list[float]
    scores: Tensor

    @staticmethod
    def of(measurements: list[Measurement]) -> "Cell":
        """Combine measurements; a seed that was run twice counts once."""
        by_seed: dict[int, list[Tensor]] = defaultdict(list)
        for one in measurements:
            by_seed[one.result.seed].append(one.scores)
        means = [torch.stack(scores).mean(0) for scores in by_seed.values()]
        scores = torch.stack(means).mean(0)
        over_episodes = stats.estimate(scores)
        by_seed_means = [mean.mean().item() for mean in means]
        return Cell(over_episodes.mean, over_episodes.ci95, by_seed_means, scores)

    @property
    def seeds_ci95(self) -> float | None:
        """Half-width of the 95% interval over seeds, if there are several."""
        return stats.over_seeds(self.by_seed).ci95 if len(self.by_seed) > 1 else None


def runs_in(folders: list[Path]) -> tuple[list[Path], dict[Path, str]]:
    """Find runs: the folders themselves, or those below them; links below them are not followed.

    Returns:
        The folders of finished runs, and why each other folder is left out.
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

    Raises:
        UserError: If the run is not readable, or scores and result disagree.
    """
    files = RunFolder(folder)
    own = files.read_result()
    config = read_yaml(files.config)
    try:
        settings = _identity(config)
    except (KeyError, TypeError, AttributeError):  # foreign: a number where settings should be
        raise UserError(f"{files.config} does not hold the settings of a run") from None
    tests = [(own, files.scores, "")]  # a result, its scores, and how its adaptation differs
    for path in sorted(files.evaluations.glob("*.json")):
        result = Result.read(path)
        variant = path.stem.partition("-")[2]
        if variant or result.protocol_id != own.protocol_id:
            tests.append((result, files.evaluation_scores(path), variant))
    for result, scores_file, variant in tests:
        parts = [] if result.split == "test" else [f"split {result.split}"]
        other = result.evaluation.get("dataset")
        if other and result.protocol.get("data") != own.protocol.get("data"):
            parts.append(other)
        scores = read_scores(scores_file)
        _check_scores(scores_file, scores, result)
        yield Measurement(
            folder=folder,
            name=own.name,
            settings=settings,
            result=dataclasses.replace(result, seed=own.seed),
            variant=variant,
            source=" ".join(parts),
            minutes=own.seconds / 60,
            hardware=own.hardware,
            scores=scores,
        )


def _check_scores(file: Path, scores: Tensor, result: Result) -> None:
    test = result.test
    protocol = result.protocol
    if result.protocol_id != hash_of(protocol) or protocol.get("episodes") != test.episodes:
        raise UserError(f"{file.parent}: protocol {result.protocol_id} is not that of its result")
    if len(scores) != test.episodes:
        raise UserError(f"{file} has {len(scores)} scores, not {test.episodes}")
    mean = scores.mean().item()
    if abs(mean - test.mean) > 1e-4 * max(1.0, abs(test.mean)):
        raise UserError(f"{file} has mean {mean:.4f}, the result {test.mean:.4f}")


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that distinguish a method from others, by dotted name."""
    complete = checking.complete(config, is_strict=False)
    known = roles.roles(complete, is_strict=False)
    return {
        key: value for key, value in _leaves(complete) if roles.distinguishes_methods(key, known)
    }


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", visible(value) if isinstance(value, str) else value
