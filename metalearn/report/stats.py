"""Compute statistics of scores: 95% intervals over episodes or seeds, differences, calibration.

Accuracies are in [0, 1]. Legend of shapes: E episodes, M predictions, C classes.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from scipy.special import stdtr, stdtrit
from torch import Tensor

from metalearn.tasks.types import Estimate


@dataclasses.dataclass(frozen=True)
class Difference:
    """A mean paired difference, the half-width of its 95% interval, and its two-sided p-value."""

    mean: float
    ci95: float
    p_value: float
    episodes: int


def _t_interval(values: Tensor) -> tuple[float, float]:
    """Return mean and half-width t_(0.975, n-1) * s / sqrt(n) of the 95% interval (Student 1908).

    s has n - 1 degrees of freedom.
    """
    count = values.numel()
    if count < 2:
        raise ValueError(f"an interval requires at least two values, not {count}")
    var, mean = torch.var_mean(values.double())
    return mean.item(), float(stdtrit(count - 1, 0.975)) * math.sqrt(var.item() / count)


def estimate(scores: Tensor) -> Estimate:
    """Compute the mean and its 95% interval over E >= 2 independent episodes or seeds, [E].

    Raises:
        ValueError: If there are fewer than two scores.
    """
    return Estimate(*_t_interval(scores), scores.numel())


def paired_difference(a: Tensor, b: Tensor) -> Difference:
    """Compute the mean of a - b over shared episodes, its interval and p-value (paired t-test).

    Args:
        a: Scores of one method [E], E >= 2.
        b: Scores of another method on the same episodes in the same order [E].

    Raises:
        ValueError: If the lengths differ or are below two.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"paired scores require the same episodes: {tuple(a.shape)} and {tuple(b.shape)}"
        )
    difference = a.double() - b.double()
    mean, half_width = _t_interval(difference)
    count = difference.numel()
    error = difference.std().item() / math.sqrt(count)
    # Without spread, the t-statistic is undefined.
    p_value = 2 * stdtr(count - 1, -abs(mean) / error) if error else mean == 0
    return Difference(mean, half_width, float(p_value), count)


def base_and_novel(
    correct: Tensor, classes: Tensor, num_base: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute each episode's accuracy on base and on novel classes, and their harmonic mean.

    As in generalised few-shot learning (Ye et al. 2021): the harmonic mean of an episode is 0 if
    one of the two is 0.

    Args:
        correct: Whether each query was classified correctly, [E, Q].
        classes: Its class, int64 [E, Q]; -1 after the queries of an episode that has fewer than
            others. Each episode has queries of both kinds.
        num_base: Number of base classes, which come first.

    Returns:
        Accuracy on base classes, on novel classes, harmonic mean: float64 [E] each.
    """
    base, novel = (
        ((correct == 1) & kind).sum(1).double() / kind.sum(1).double()
        for kind in ((classes >= 0) & (classes < num_base), classes >= num_base)
    )
    return base, novel, 2 * base * novel / (base + novel).clamp_min(1e-12)


def unpaired_p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """Compute the two-sided p-value of equal means of two groups of seeds (Welch 1947).

    Raises:
        ValueError: If a group has fewer than two seeds.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError("a test over seeds requires at least two seeds per method")
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (a, b))
    gap = (x.mean() - y.mean()).abs().item()
    parts = [values.var().item() / len(values) for values in (x, y)]
    if sum(parts) == 0:  # without spread, the t-statistic is undefined
        return float(gap == 0)
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (len(x) - 1) + parts[1] ** 2 / (len(y) - 1))
    return float(2 * stdtr(freedom, -gap / math.sqrt(sum(parts))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values of several comparisons: all hold at once with 95% confidence (Holm 1979)."""
    p = torch.tensor(p_values, dtype=torch.float64)
    order = p.argsort()
    factors = torch.arange(len(p), 0, -1)
    adjusted = torch.empty_like(p)
    adjusted[order] = (factors * p[order]).clamp_max(1).cummax(0).values
    return list(adjusted.tolist())


def episodes_needed(scores: Tensor, half_width: float) -> int:
    """Compute how many episodes would give a 95% interval of this half-width.

    Args:
        scores: Scores with the expected spread [E], E >= 2.
        half_width: Desired half-width > 0, in the unit of the scores.
    """
    std = scores.double().std().item()
    count = max(2, math.floor((std * 1.959 / half_width) ** 2))
    while float(stdtrit(count - 1, 0.975)) * std / math.sqrt(count) > half_width:
        count += 1
    return count


def worst_decile(scores: Tensor, higher_is_better: bool = True) -> tuple[float, list[int]]:
    """Return the mean score of the worst tenth of the episodes, and their indices, worst first.

    Args:
        scores: One score per episode [E]; a tenth of E is rounded up.
        higher_is_better: False if the worst scores are the highest.
    """
    order = scores.argsort(descending=not higher_is_better, stable=True)
    worst = order[: math.ceil(scores.numel() / 10)]
    return scores[worst].double().mean().item(), worst.tolist()


def per_class_accuracy(correct: Tensor, classes: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Compute the accuracy of each class.

    Args:
        correct: Whether each prediction is correct, bool [M].
        classes: True class of each prediction, int64 [M].
        num_classes: C.

    Returns:
        Accuracy per class [C] (NaN for a class without predictions), predictions per class [C].
    """
    counts = torch.bincount(classes, minlength=num_classes)
    hits = torch.bincount(classes, weights=correct.double(), minlength=num_classes)
    return hits / counts, counts


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Compute the expected calibration error (Guo et al. 2017, eq. 3).

    It is the mean gap between confidence and accuracy over bins of equal width, weighted by the
    share of predictions in each bin.

    Args:
        confidence: Probability of the predicted class [M], in [0, 1].
        correct: Whether each prediction is correct, bool [M].
        bins: Number of bins.
    """
    # Bins are (low, high], as in the paper.
    index = (confidence.double() * bins).ceil().clamp(1, bins).long() - 1
    gap = torch.bincount(index, weights=correct.double() - confidence.double(), minlength=bins)
    return (gap.abs().sum() / confidence.numel()).item()
