"""Show how far a run is: a live line on a terminal, else a printed line now and then."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from metalearn.config.schema import RunConfig
from metalearn.report.console import print_line, print_lines
from metalearn.report.tables import format_interval, format_value
from metalearn.system import signals

#: Without a terminal, seconds between printed lines; every validation is printed.
_QUIET_SECONDS = 15.0
#: Seconds after which the first line of a run is printed even if only one step is done.
_PATIENCE_SECONDS = 3.0
#: Seconds between measurements of the speed.
_UPDATE_SECONDS = 0.5
#: Seconds over which the measured time of a step is averaged.
_AVERAGE_SECONDS = 30.0
_BAR_WIDTHS = (4, 40)


class Probe(NamedTuple):
    """What a listener may ask the training loop between two steps."""

    metrics: Callable[[], dict[str, float]]  # current ones, without waiting for the device, or {}
    wait: Callable[[], None]  # until the device has computed all steps
    seconds_per_episode: Callable[[], float]  # evaluates a few


class Listener:
    """Receives the progress of the training loop, and discards what a subclass does not use."""

    def begin(self, probe: Probe) -> None:
        """Training begins."""

    def step(self, step: int) -> None:
        """Count a step, without reading from the device."""

    def episodes(self, phase: str, done: int, total: int) -> None:
        """Count evaluated episodes of the phase "val" or "test"; `done` is 0 at its beginning."""

    def embedding(self, done: int, total: int) -> None:
        """Count inputs embedded once for all episodes."""

    def log(self, row: dict[str, Any]) -> None:
        """Log a row: `step` and its metrics."""

    def note(self, line: str) -> None:
        """Print a line for the user."""


SILENT = Listener()


class Forecast:
    """Seconds that a run still needs, from the times of its steps and episodes so far."""

    def __init__(self, settings: RunConfig) -> None:
        self.step = 0  # the last one
        self.episodes = 0  # done in the validation or test under way
        self.per_step: float | None = None  # seconds; None until one was timed
        self.per_episode: float | None = None
        self._settings = settings

    def validations(self) -> int:
        """Return the number of validations after the last step."""
        steps, every = self._settings.train.steps, self._settings.val.every
        return -(-steps // every) - self.step // every if self.step < steps else 0

    def remaining(self, phase: str) -> float | None:
        """Return the seconds until the end of the test, or None if they are not known yet."""
        settings = self._settings
        steps = settings.train.steps - self.step
        if self.per_episode is None or (steps and self.per_step is None):
            return None
        validations = 0 if phase == "test" else self.validations() + (phase == "val")
        episodes = settings.test.episodes - self.episodes + validations * settings.val.episodes
        return steps * (self.per_step or 0.0) + episodes * self.per_episode

    def add_steps(self, count: int, seconds: float) -> None:
        """Count steps that took some seconds."""
        share = 1.0 if self.per_step is None else 1 - math.exp(-seconds / _AVERAGE_SECONDS)
        self.per_step = (1 - share) * (self.per_step or 0.0) + share * seconds / count


class Progress(Listener):
    """Steps, speed, metrics, elapsed and remaining time of a run.

    Args:
        score: Name of the metric.
        announcement: Lines to print with the expected duration, as soon as it is known.
        step: The step to resume from, or 0; the number of steps for a test alone.
        seconds_before: Seconds that the run took before it was interrupted.
    """

    def __init__(
        self,
        settings: RunConfig,
        score: str,
        console: Console,
        announcement: list[str],
        step: int = 0,
        seconds_before: float = 0.0,
    ) -> None:
        self._settings, self._score = settings, score
        self._console, self._announcement = console, announcement
        self._probe: Probe | None = None
        self._forecast = Forecast(settings)
        self._metrics: dict[str, float] = {}
        self._speed: dict[str, str] = {}
        self._status = ""
        self._began = self._printed = self._updated = time.monotonic()
        self._began -= seconds_before
        self._first_step = 0.0  # seconds of the first step, which is the slowest
        self._enter("train", step, settings.train.steps)

    def _enter(self, phase: str, done: int, total: int) -> None:
        """Begin a phase. Its speed is measured from now on."""
        self._phase, self._done, self._total = phase, done, total
        self._since = done, time.monotonic()
        self._entered = self._since[1]
        if phase == "train":
            self._forecast.step, self._forecast.episodes = done, 0

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Draw the live line, if the console is a terminal."""
        if not self._console.is_terminal:
            yield
            return
        line = Live(
            get_renderable=self._line, console=self._console, refresh_per_second=4, transient=True
        )
        with line, signals.announced_by(lambda line: setattr(self, "_status", line)):
            yield

    def begin(self, probe: Probe) -> None:
        self._probe = probe
        self._enter("train", self._done, self._total)

    def step(self, step: int) -> None:
        now = time.monotonic()
        self._done = self._forecast.step = step
        if not self._first_step:
            self._first_step = now - self._since[1]
            self._since = step, now
        if self._announcement:
            timed = step - self._since[0]
            waited = now - self._since[1] + self._first_step
            if waited > _PATIENCE_SECONDS or (timed >= 2 and waited > _UPDATE_SECONDS):
                self.announce()
        elif now - self._updated >= _UPDATE_SECONDS:
            self._measure(now)
            self._print_if_due()

    def announce(self) -> None:
        """Print the first lines of the run, with the time that it will take if it is known."""
        lines, self._announcement = self._announcement, []
        if not lines:
            return
        if self._probe is not None and self._first_step:
            self._probe.wait()
            if self._done > self._since[0]:
                self._measure(time.monotonic())
            else:
                self._forecast.add_steps(1, self._first_step)
            self._forecast.per_episode = self._probe.seconds_per_episode()
            self._enter("train", self._done, self._total)
            remaining = self._forecast.remaining("train") or 0.0
            lines = [f"{lines[0]}; about {format_duration(remaining)}", *lines[1:]]
        print_lines(self._console, lines)

    def episodes(self, phase: str, done: int, total: int) -> None:
        if done == 0:
            self.announce()
            self._enter(phase, 0, total)
            return
        self._done = self._forecast.episodes = done
        self._measure(time.monotonic())
        if done == total and phase == "val":
            self._enter("train", self._forecast.step, self._settings.train.steps)
        else:
            self._print_if_due()

    def embedding(self, done: int, total: int) -> None:
        self._status = "" if done == total else f"embedding input {done:,}/{total:,}"
        if self._status and self._is_due():
            print_line(self._console, self._status)
            self._printed = time.monotonic()

    def _is_due(self) -> bool:
        """Return True if a line should be printed, because there is no terminal."""
        waited = time.monotonic() - self._printed
        return waited > _QUIET_SECONDS and not self._console.is_terminal

    def _measure(self, now: float) -> None:
        """Measure the speed of the phase since it was measured last."""
        count, seconds = self._done - self._since[0], max(now - self._since[1], 1e-9)
        if count == 0:
            return
        if self._phase == "train":
            self._forecast.add_steps(count, seconds)
            if self._probe is not None:
                self._metrics |= self._probe.metrics()
            count *= self._settings.train.meta_batch
        else:
            # From the beginning of the phase, which may have embedded the inputs of all episodes.
            self._forecast.per_episode = (now - self._entered) / self._done
        speed = count / seconds
        self._speed[self._phase] = f"{speed:.0f} tasks/s" if speed >= 10 else f"{speed:.1f} tasks/s"
        self._since = self._done, now
        self._updated = now

    def log(self, row: dict[str, Any]) -> None:
        """Show the metrics of a row; print it if it has a validation."""
        self._metrics = {key: row[key] for key in row if key.startswith("train.")}
        value = row.get(f"val.{self._score}")
        if value is not None:
            interval = format_interval(self._score, value, row[f"val.{self._score}_ci95"])
            self._print(f"val {interval}")

    def _print_if_due(self) -> None:
        if self._is_due():
            done = f"{self._phase} {self._done}/{self._total} episodes"
            self._print("" if self._phase == "train" else done)

    def _print(self, result: str) -> None:
        count = f"step {self._forecast.step:>6}/{self._settings.train.steps}"
        print_line(self._console, self._joined("  ", count, result))
        self._printed = time.monotonic()

    def _joined(self, separator: str, count: str, result: str = "") -> str:
        """Return a count with the speed, the metrics, perhaps a result, and the times."""
        parts = [count, self._speed.get(self._phase, "")]
        loss, value = (self._metrics.get(f"train.{name}") for name in ("loss", self._score))
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        if value is not None and self._score == "accuracy":
            parts.append(f"acc {100 * value:.1f}%")
        elif value is not None and value != loss:
            parts.append(f"{self._score} {format_value(self._score, value)}")
        now = time.monotonic()
        times, remaining = _clock(now - self._began), self._forecast.remaining(self._phase)
        if remaining is not None:
            times += f", {_clock(max(0.0, remaining - (now - self._updated)))} left"
        return separator.join(part for part in (*parts, result, times) if part)

    def _line(self) -> Table:
        """Return the live line, at most as wide as the console."""
        text = self._status or self._joined(" ", f"{self._done}/{self._total}")
        smallest, widest = _BAR_WIDTHS
        room = self._console.width - len(self._phase) - len(text) - 3
        bar = ProgressBar(self._total or 1, self._done, width=max(smallest, min(widest, room)))
        table = Table.grid(padding=(0, 1))
        for _ in range(3):
            table.add_column(no_wrap=True, overflow="ellipsis")
        table.add_row(Text(self._phase, "bold"), bar, Text(text))
        return table


def _clock(seconds: float) -> str:
    """Return seconds like 4:05 or 1:04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_duration(seconds: float) -> str:
    """Return a rough duration in words, like 40 s, 12 min or 3.5 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
