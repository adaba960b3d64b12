"""A run that other processes slow down says so, once."""

import os

import pytest
import torch

from metalearn.run.meter import Meter
from metalearn.system import cores
from metalearn.system.cores import Competition, Usage

#: 10 seconds of two cores to ourselves.
_ALONE = Usage(10.0, 20.0, 20.0)


def lines(*rows):
    competition = Competition()
    return [competition.add(tasks, used) for tasks, used in rows]


def test_a_rate_that_falls_to_half_is_reported_once_if_others_use_the_cores():
    shared = 450, Usage(10.0, 9.0, 20.0)
    first, *rest = lines((1000, _ALONE), (960, _ALONE), shared, shared)
    assert first is None and rest[0] is None and rest[2] is None
    assert rest[1] == (
        f"45.0 tasks/s instead of 100.0: other processes use the cores, 1.1 of {os.cpu_count()}"
    )


@pytest.mark.parametrize(
    ("tasks", "used"),
    [
        pytest.param(300, _ALONE, id="a phase with more work per task"),
        pytest.param(300, Usage(10.0, 10.0, 10.2), id="a phase that uses one core"),
        pytest.param(300, Usage(10.0, 1.0, 1.0), id="waiting for a disk"),
        pytest.param(700, Usage(10.0, 14.0, 20.0), id="others use a third"),
    ],
)
def test_a_phase_that_is_slower_for_other_reasons_is_not_reported(tasks, used):
    assert lines((1000, _ALONE), (tasks, used)) == [None, None]


def test_short_rows_are_counted_together():
    rows = [(10, Usage(0.5, 1.0, 1.0))] * 8 + [(2, Usage(0.5, 0.3, 1.0))] * 3
    assert not any(lines(*rows))
    assert lines(*rows, rows[-1])[-1].startswith("4.0 tasks/s instead of 20.0")


def test_the_meter_measures_without_the_time_of_validations(monkeypatch):
    times = iter(
        [Usage(0.0, 0.0, 0.0), _ALONE, Usage(90.0, 20.0, 180.0), Usage(100.0, 25.0, 200.0)]
    )
    monkeypatch.setattr(cores, "usage", lambda: next(times))
    meter = Meter(torch.device("cpu"))
    meter.count(1000)
    meter.read()
    assert meter.notice is None
    meter.restart_clock()  # after a validation
    meter.count(200)
    meter.read()
    assert meter.notice and meter.notice.startswith("20.0 tasks/s instead of 100.0")


def test_usage_grows_with_the_work_of_this_process():
    before = cores.usage()
    if before is None:
        pytest.skip("requires /proc/stat")
    while (now := cores.usage()) and now.own < before.own + 0.05:
        pass
    assert now is not None
    used = now.since(before)
    assert used.own >= 0.05 and used.wall >= used.own / (os.cpu_count() or 1)
    assert used.all >= used.own - 0.05
