"""Statistics against worked examples and against scipy."""

import pytest
import torch
from scipy import stats as scipy_stats

from metalearn.report import stats
from metalearn.report.measurements import Cell


def test_interval_equals_a_worked_example():
    # 1..5: mean 3, standard deviation sqrt(2.5), t(0.975, 4) = 2.776445.
    estimate = stats.estimate(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert (estimate.mean, estimate.episodes) == (3.0, 5)
    assert estimate.ci95 == pytest.approx(2.7764451 * (2.5 / 5) ** 0.5, rel=1e-6)
    low, high = scipy_stats.t.interval(0.95, 4, loc=3, scale=(2.5 / 5) ** 0.5)
    assert estimate.ci95 == pytest.approx((high - low) / 2)
    with pytest.raises(ValueError, match="at least two"):
        stats.estimate(torch.tensor([1.0]))


def test_each_seed_is_one_value():
    # t(0.975, 1) * 0.01 / sqrt(2) / sqrt(2)
    interval = Cell(0.975, 0.1, [0.97, 0.98], torch.zeros(2)).seeds_ci95
    assert interval == pytest.approx(12.7062047 * 0.005, rel=1e-6)
    assert Cell(0.97, 0.1, [0.97], torch.zeros(2)).seeds_ci95 is None


def test_paired_difference_is_the_paired_t_test():
    torch.manual_seed(0)
    a = torch.rand(200, dtype=torch.float64)
    b = a + 0.02 * torch.randn(200, dtype=torch.float64) - 0.003
    estimate = stats.paired_difference(a, b)
    expected = scipy_stats.ttest_rel(a.numpy(), b.numpy())
    assert estimate.mean == pytest.approx((a - b).mean().item())
    assert estimate.p_value == pytest.approx(expected.pvalue)
    assert estimate.ci95 == pytest.approx(expected.confidence_interval(0.95).high - estimate.mean)
    # Pairing on the same episodes narrows the interval.
    assert estimate.ci95 < 0.2 * stats.estimate(a).ci95
    assert stats.paired_difference(a, a).p_value == 1
    assert stats.paired_difference(a, torch.zeros(200).double() + a - 0.5).p_value < 1e-6
    with pytest.raises(ValueError, match="same episodes"):
        stats.paired_difference(a, b[:10])


def test_unpaired_p_value_is_welchs_t_test():
    a, b = [0.95, 0.96, 0.958], [0.97, 0.965, 0.972, 0.968]
    assert stats.unpaired_p_value(a, b) == pytest.approx(
        scipy_stats.ttest_ind(a, b, equal_var=False).pvalue
    )
    assert stats.unpaired_p_value([0.5, 0.5], [0.5, 0.5]) == 1
    with pytest.raises(ValueError, match="two seeds"):
        stats.unpaired_p_value([0.5], b)


def test_holm_adjustment_equals_a_worked_example():
    # Sorted 0.01, 0.03, 0.04: times 3, 2, 1 -> 0.03, 0.06, max(0.06, 0.04).
    assert stats.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_episodes_needed_is_the_smallest_sufficient_number():
    torch.manual_seed(0)
    scores = 0.9 + 0.1 * torch.randn(50, dtype=torch.float64)
    std = scores.std().item()
    for half_width in (0.2, 0.05, 0.01, 0.001):
        count = stats.episodes_needed(scores, half_width)
        width = lambda n: scipy_stats.t.ppf(0.975, n - 1) * std / n**0.5  # noqa: E731
        assert width(count) <= half_width
        assert count == 2 or width(count - 1) > half_width
    assert stats.episodes_needed(torch.ones(5), 0.01) == 2


def test_worst_decile_equals_a_worked_example():
    scores = torch.arange(30).float().flip(0)
    assert stats.worst_decile(scores) == (1.0, [29, 28, 27])
    assert stats.worst_decile(scores, higher_is_better=False) == (28.0, [0, 1, 2])
    assert stats.worst_decile(torch.tensor([3.0, 1.0])) == (1.0, [1])


def test_per_class_accuracy_equals_a_worked_example():
    accuracy, counts = stats.per_class_accuracy(
        torch.tensor([True, False, True, True]), torch.tensor([0, 0, 2, 2]), num_classes=4
    )
    assert counts.tolist() == [2, 0, 2, 0]
    assert accuracy[[0, 2]].tolist() == [0.5, 1.0]
    assert accuracy[[1, 3]].isnan().all()


def test_calibration_error_equals_a_worked_example():
    # Bins of 0.5: (0, 0.5] holds 0.4 right and 0.5 wrong, (0.5, 1] holds 0.9 right, 1.0 right.
    confidence, correct = (
        torch.tensor([0.4, 0.5, 0.9, 1.0]),
        torch.tensor([True, False, True, True]),
    )
    assert stats.expected_calibration_error(confidence, correct, bins=2) == pytest.approx(
        0.5 * abs(0.5 - 0.45) + 0.5 * abs(1 - 0.95)
    )
    torch.manual_seed(0)
    confidence = torch.rand(100_000)
    assert stats.expected_calibration_error(confidence, torch.rand(100_000) < confidence) < 0.01


def test_interval_covers_the_true_mean():
    # `make benchmark-intervals` measures it more precisely, on 10,000 runs of 600 episodes.
    torch.manual_seed(0)
    covered = 0
    for scores in torch.rand(2000, 30, dtype=torch.float64):
        estimate = stats.estimate(scores)
        covered += abs(estimate.mean - 0.5) <= estimate.ci95
    assert 0.935 < covered / 2000 < 0.965
