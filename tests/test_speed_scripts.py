"""The benchmark of speed: what it compares is the same computation, and noise is discarded."""

import benchmark_speed
import pytest
import speed_page
import torch
from plain_loop import plain_step

from tests.fixtures import to_float64

_HALF = torch.tensor(0.5)
_STRIDE = ("backbone.downsample=stride", "backbone.output=mean")


@pytest.mark.parametrize(
    "words",
    [
        ("algo=maml", "algo.inner_steps=2", *_STRIDE),
        ("algo=fomaml", *_STRIDE),
        ("algo=anil", *_STRIDE),
        ("algo=protonet",),
    ],
    ids=lambda words: words[0],
)
def test_the_plain_loop_has_the_gradients_and_losses_of_the_engine(words, make_run):
    run = make_run(*words, "train.meta_batch=2", "episode.query=2")
    tasks = run.train.draw(0, 2)
    gradients, losses, statistics = plain_step(run)(tasks)
    expected = run.train_engine.step(run.state, tasks, _HALF)
    torch.testing.assert_close(losses, expected.losses, rtol=1e-4, atol=1e-5)
    assert statistics.keys() == expected.statistics.keys()
    for name, value in expected.statistics.items():
        torch.testing.assert_close(statistics[name], value, rtol=1e-3, atol=1e-5)
    assert list(gradients) == list(run.state.params)
    exact = benchmark_speed.exact_gradients(run, tasks)
    assert benchmark_speed.error(gradients, exact) < 1e-2  # a ReLU may flip
    assert benchmark_speed.error(to_float64(exact), exact) == 0


def sampled(speed, others):
    return {"tasks": 10, "wall": 10 / speed, "cpu": 0.1, "others": others}


def test_samples_with_a_busy_neighbour_are_discarded_and_counted():
    quiet = [sampled(speed, 0.0) for speed in (90, 100, 110)]
    summary = benchmark_speed._summary([*quiet, sampled(10, 0.9)])
    assert summary["tasks_per_second"] == pytest.approx(100)
    assert (summary["samples"], summary["discarded"], summary["is_noisy"]) == (3, 1, False)
    noisy = benchmark_speed._summary([quiet[0], sampled(10, 0.9), sampled(20, 0.9)])
    assert noisy["tasks_per_second"] == pytest.approx(20)
    assert noisy["is_noisy"] and noisy["discarded"] == 0


def test_a_fast_wrong_gradient_is_marked():
    summary = benchmark_speed._summary([sampled(100, 0.0)] * 3)
    assert "wrong gradient" in speed_page._speed(summary | {"error": 0.3})
    assert "wrong" not in speed_page._speed(summary | {"error": 1e-3})
