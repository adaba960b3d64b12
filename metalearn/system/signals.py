"""SIGTERM and SIGINT: the first ends a run at the next place where it can be saved, the second at once."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: Signals this close to the first come from the same sender, as when a launcher forwards what all processes get.
_SAME_SECONDS = 0.5
_asked: int | None = None
_asked_at = 0.0
_deferred = False


class Stopped(BaseException):
    """A signal ended what was going on. No `Exception`, so that nothing takes it for a failed run and goes on."""

    def __init__(self, number: int, line: str = "") -> None:
        super().__init__(line or f"interrupted by {signal.Signals(number).name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """As shells have it: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.number


def listen() -> None:
    """Makes both signals do what this module says; for the main thread."""
    for number in _SIGNALS:
        signal.signal(number, _on_signal)


def asked() -> int | None:
    """The signal that has come since `deferred` began, if any."""
    return _asked


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, the first signal is only noted, and whoever is inside looks at `asked` where it can stop.

    Raises: Stopped at the end, where one has come and nobody inside has looked.
    """
    global _deferred
    before, _deferred = _deferred, True
    try:
        yield
    finally:
        _deferred = before
    if _asked is not None and not _deferred:
        raise Stopped(_asked)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _asked, _asked_at
    if _asked is not None:
        if time.monotonic() - _asked_at > _SAME_SECONDS:
            os._exit(128 + number)
        return
    _asked, _asked_at = number, time.monotonic()
    if not _deferred:
        raise Stopped(number)
    line = f"{signal.Signals(number).name}: saving after the step or validation under way; once more to leave at once\n"
    with contextlib.suppress(OSError):  # who reads, like a `tee`, may have left on the same signal
        os.write(sys.stderr.fileno(), line.encode())
