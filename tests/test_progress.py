"""The progress display: what it shows, when it is printed, and its forecast."""

import io
import time

import pytest
import torch
from rich.console import Console

from metalearn.report import progress
from metalearn.report.progress import Forecast, Progress, format_duration
from metalearn.run import loop
from metalearn.run.step import Training
from metalearn.system import signals


class Clock:
    """A clock that the test moves, instead of `time.monotonic`."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


PROBE = progress.Probe(
    lambda: {"train.loss": 1.25, "train.accuracy": 0.5}, lambda: None, lambda: 0.1
)


@pytest.fixture
def settings(make_run):
    return make_run(
        "algo=maml", "train.steps=1000", "val.every=400", "val.episodes=50", "test.episodes=200"
    ).config


def shown(settings, width=80, terminal=True):
    """Return a display and the text that it has printed so far."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, color_system=None)
    display = Progress(settings, "accuracy", console, ["maml glyphs: 1,000 steps", "recipe: none"])
    return display, out, console


def test_remaining_time_counts_steps_validations_and_test(settings):
    forecast = Forecast(settings)
    assert forecast.remaining("train") is None
    forecast.add_steps(10, 5.0)
    forecast.per_episode = 0.1
    # 1,000 steps, validations after 400, 800 and 1,000, and the test.
    assert forecast.remaining("train") == pytest.approx(500 + 3 * 5 + 20)
    forecast.step, forecast.episodes = 400, 20
    assert forecast.remaining("val") == pytest.approx(300 + 3 + 2 * 5 + 20)
    forecast.step, forecast.episodes = 1000, 150
    assert forecast.remaining("test") == pytest.approx(5)


def test_first_line_waits_for_one_slow_step_at_most(settings, monkeypatch):
    clock = Clock(monkeypatch)
    display, out, _ = shown(settings, terminal=False)
    display.begin(PROBE)
    assert not out.getvalue()
    clock.now += 4
    display.step(1)
    assert out.getvalue() == "maml glyphs: 1,000 steps; about 67 min\nrecipe: none\n"


def test_first_line_leaves_out_the_slow_first_step(settings, monkeypatch):
    clock = Clock(monkeypatch)
    display, out, _ = shown(settings, terminal=False)
    display.begin(PROBE)
    for step, seconds in enumerate((2, 0.5, 0.5), 1):
        clock.now += seconds
        display.step(step)
    assert out.getvalue().startswith("maml glyphs: 1,000 steps; about 9 min\n")


@pytest.mark.parametrize("seconds", [0.02, 1.0])  # 200 and 4 tasks per second
def test_live_line_has_everything_and_fits_80_columns(settings, monkeypatch, seconds):
    clock = Clock(monkeypatch)
    display, _, console = shown(settings)
    display.begin(PROBE)
    for step in range(1, 301):
        clock.now += seconds
        display.step(step)
    line = console.render_lines(display._line(), pad=False)
    text = "".join(segment.text for segment in line[0])
    assert len(line) == 1
    assert len(text) <= 80
    count = settings.train.meta_batch / seconds
    wanted = ["train", "300/1000", f"{count:.0f} tasks/s", "loss 1.2500", "acc 50.0%", " left"]
    assert [part for part in wanted if part in text] == wanted


def test_a_pipe_gets_a_line_now_and_then_also_in_a_validation(settings, monkeypatch):
    clock = Clock(monkeypatch)
    display, out, _ = shown(settings, terminal=False)
    display.begin(PROBE)
    for step in range(1, 101):
        clock.now += 1
        display.step(step)
    lines = out.getvalue().splitlines()[2:]
    assert 5 <= len(lines) <= 7
    assert all("left" in line and "tasks/s" in line for line in lines)
    display.episodes("val", 0, 50)
    clock.now += 20
    display.episodes("val", 25, 50)
    assert "val 25/50 episodes" in out.getvalue().splitlines()[-1]


def test_after_a_validation_the_speed_is_of_training_and_the_time_counts_embedding(
    settings, monkeypatch
):
    clock = Clock(monkeypatch)
    display, _, console = shown(settings)
    display.begin(PROBE)
    for step in range(1, 401):
        clock.now += 1
        display.step(step)
    display.episodes("val", 0, 50)
    clock.now += 9  # the inputs of all episodes are embedded
    display.embedding(50, 50)
    for done in (25, 50):
        clock.now += 0.5
        display.episodes("val", done, 50)
    text = "".join(part.text for part in console.render_lines(display._line(), pad=False)[0])
    assert f"400/1000 {settings.train.meta_batch:.0f} tasks/s" in text
    # 600 steps, two validations of 10 s, and 200 episodes at 0.2 s each.
    assert "11:00 left" in text


def test_metrics_are_read_between_rows(make_run, tmp_path):
    run = make_run("algo=maml", "train.steps=3")
    training = Training(run)
    assert training.meter.peek() == {}
    for _ in range(2):
        training.meta_step()
        training.count()
    peeked = training.meter.peek()
    row = training.meter.read()
    assert peeked == {name: pytest.approx(row[name]) for name in peeked}
    assert "train.loss" in peeked


def test_validation_stops_at_once_and_is_repeated(make_run, tmp_path, monkeypatch):
    overrides = ("algo=maml", "train.steps=4", "val.every=2", "val.episodes=6")
    folder = tmp_path / "stopped"
    for path in (tmp_path / "whole", folder):
        path.mkdir()
    whole = loop.fit(make_run(*overrides), progress.SILENT, tmp_path / "whole")

    class Interrupting(progress.Listener):
        def episodes(self, phase, done, total):
            if training[0].step == 2 and done == 0:
                signals._on_signal(2, None)

    training = []
    init = Training.__init__

    def remember(self, run):
        init(self, run)
        training.append(self)

    monkeypatch.setattr(Training, "__init__", remember)
    monkeypatch.setattr(signals, "_first_signal", None)
    with pytest.raises(signals.Stopped, match="stopped in the validation of step 2, saved"):
        loop.fit(make_run(*overrides), Interrupting(), folder)
    monkeypatch.setattr(signals, "_first_signal", None)
    stored = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    assert stored["step"] == 2
    assert stored["best"] is None
    rows = []

    class Rows(progress.Listener):
        def log(self, row):
            rows.append(row)

    resumed = loop.fit(make_run(*overrides), Rows(), folder, stored)
    assert [row["step"] for row in rows if "val.accuracy" in row] == [2, 4]
    assert resumed.best_val == whole.best_val
    for name, value in whole.state.params.items():
        assert torch.equal(value, resumed.state.params[name])


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (89, "89 s"), (600, "10 min"), (7200, "2.0 h")]
)
def test_durations_are_rounded(seconds, text):
    assert format_duration(seconds) == text
