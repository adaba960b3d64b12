"""What scores say: means and 95% intervals over episodes and over seeds, paired differences, calibration.

Accuracies are shares in [0, 1]. Legend of shapes: E episodes, M predictions, C classes.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from scipy.special import stdtr, stdtrit
from torch import Tensor

from metalearn.tasks.types import Estimate


@dataclasses.dataclass(frozen=True)
class SeedEstimate:
    """A mean over seeds with the half-width of its 95% interval."""

    mean: float
    ci95: float
    seeds: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """A mean paired difference, the half-width of its 95% interval, and its two-sided p-value."""

    mean: float
    ci95: float
    p_value: float
    episodes: int


def _t_interval(values: Tensor) -> tuple[float, float]:
    """Mean and half-width of the 95% interval: t_(0.975, n-1) * s / sqrt(n), s with n - 1 (Student 1908)."""
    count = values.numel()
    if count < 2:
        raise ValueError(f"an interval wants at least two values, not {count}")
    var, mean = torch.var_mean(values.double())
    return mean.item(), float(stdtrit(count - 1, 0.975)) * math.sqrt(var.item() / count)


def estimate(scores: Tensor) -> Estimate:
    """Mean and 95% interval over independent episodes, Student's t.

    Args: scores: [E], one an episode, E >= 2.
    Raises: ValueError with fewer than two scores.
    """
    return Estimate(*_t_interval(scores), scores.numel())


def over_seeds(means: Sequence[float]) -> SeedEstimate:
    """Mean and 95% interval over runs that differ in their seed alone: each seed is one value, Student's t.

    Raises: ValueError with fewer than two seeds.
    """
    return SeedEstimate(*_t_interval(torch.tensor(means, dtype=torch.float64)), len(means))


def paired_difference(a: Tensor, b: Tensor) -> Difference:
    """Mean of a - b over shared episodes, with interval and p-value (paired t-test).

    Args: a, b: [E], the scores of two methods on the same episodes in the same order, E >= 2.
    Raises: ValueError if their lengths differ or are below two.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"paired scores want the same episodes: {tuple(a.shape)} and {tuple(b.shape)}"
        )
    difference = a.double() - b.double()
    mean, half_width = _t_interval(difference)
    count = difference.numel()
    error = difference.std().item() / math.sqrt(count)
    if error == 0:  # no spread at all: certain, one way or the other
        return Difference(mean, half_width, float(mean == 0), count)
    return Difference(mean, half_width, float(2 * stdtr(count - 1, -abs(mean) / error)), count)


def unpaired_p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value that two groups of runs have equal means, each seed one value (Welch 1947).

    Raises: ValueError with fewer than two values in a group.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError("a test over seeds wants at least two seeds on each side")
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (a, b))
    gap = (x.mean() - y.mean()).abs().item()
    parts = [values.var().item() / len(values) for values in (x, y)]
    error = math.sqrt(sum(parts))
    if error == 0:
        return float(gap == 0)
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (x, y), strict=True)
    )
    return float(2 * stdtr(freedom, -gap / error))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for several comparisons, so that all are right at once with 95% (Holm 1979)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def episodes_needed(scores: Tensor, half_width: float) -> int:
    """The number of episodes that would give this half-width of the 95% interval, with the spread of these scores.

    Args: scores: [E], E >= 2; half_width > 0, in the unit of the scores.
    """
    std = scores.double().std().item()
    count = max(2, math.floor((std * 1.959 / half_width) ** 2))
    while float(stdtrit(count - 1, 0.975)) * std / math.sqrt(count) > half_width:
        count += 1
    return count


def worst_decile(scores: Tensor, higher_is_better: bool = True) -> tuple[float, list[int]]:
    """Mean score of the worst tenth of the episodes (rounded up), and their numbers, worst first."""
    order = scores.argsort(descending=not higher_is_better, stable=True)
    worst = order[: math.ceil(scores.numel() / 10)]
    return scores[worst].double().mean().item(), worst.tolist()


def per_class_accuracy(correct: Tensor, classes: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Accuracy of each class [C] (NaN where none was asked) and how many of each were asked [C].

    Args: correct: bool [M]; classes: int64 [M], the class each prediction should have named.
    """
    asked = torch.bincount(classes, minlength=num_classes)
    hits = torch.bincount(classes, weights=correct.double(), minlength=num_classes)
    return hits / asked, asked


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Mean gap of confidence and accuracy over equally wide bins, weighted by their share (Guo et al. 2017, eq. 3).

    Args: confidence: [M] in [0, 1], of the predicted class; correct: bool [M].
    """
    place = (confidence.double() * bins).ceil().clamp(
        1, bins
    ).long() - 1  # bins are (low, high], as in the paper
    gap = torch.bincount(place, weights=correct.double() - confidence.double(), minlength=bins)
    return (gap.abs().sum() / confidence.numel()).item()
