"""Notice that other processes use the cores of a computation."""

import os
import time
from pathlib import Path
from typing import NamedTuple

_STAT = Path("/proc/stat")
#: Seconds over which a rate is measured; shorter ones say little, as the system counts in 1/100 s.
_SECONDS = 2.0


class Usage(NamedTuple):
    """Seconds since a fixed moment, summed over cores: of the clock, of this process, of all."""

    wall: float
    own: float
    all: float

    def since(self, before: "Usage") -> "Usage":
        """Return the difference."""
        return Usage(*(now - then for now, then in zip(self, before, strict=True)))

    @property
    def others(self) -> float:
        """Return the cores that other processes have used on average."""
        return (self.all - self.own) / self.wall


def usage() -> Usage | None:
    """Return the time used up to now; None where the system does not say (not Linux)."""
    try:
        columns = _STAT.read_text().partition("\n")[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _, _, *interrupts_and_stolen = map(int, columns)
    busy = user + nice + system + sum(interrupts_and_stolen)
    return Usage(time.perf_counter(), time.process_time(), busy / os.sysconf("SC_CLK_TCK"))


class Competition:
    """Says once that a computation is half as fast as it was because others use the cores.

    A phase that is slower on purpose gets as much CPU time as before, so it is not reported.
    """

    def __init__(self) -> None:
        self._units, self._used = 0, Usage(0.0, 0.0, 0.0)
        self._best: tuple[float, Usage] | None = None
        self._is_reported = False

    def add(self, units: int, used: Usage) -> str | None:
        """Add units of work (tasks) and the time they took; return a line for the user, or None."""
        self._units, self._used = (
            self._units + units,
            Usage(*map(sum, zip(self._used, used, strict=True))),
        )
        if self._used.wall < _SECONDS or self._is_reported:
            return None
        rate, now = self._units / self._used.wall, self._used
        self._units, self._used = 0, Usage(0.0, 0.0, 0.0)
        if self._best is None or rate >= self._best[0]:
            self._best = rate, now
            return None
        best, then = self._best
        cores = then.own / then.wall
        is_starved = now.own / now.wall < 0.75 * cores and now.others > then.others + 0.25 * cores
        if rate > best / 2 or not is_starved:
            return None
        self._is_reported = True
        return (
            f"{rate:.1f} tasks/s instead of {best:.1f}: other processes use the cores, "
            f"{now.others:.1f} of {os.cpu_count()}"
        )
