"""Handle SIGTERM and SIGINT.

The first signal ends a run where it can next be saved, the second ends it at once.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: Signals this soon after the first have the same cause, as when a launcher forwards a signal
#: that all processes receive.
_SAME_SECONDS = 0.5
_first_signal: int | None = None
_first_time = 0.0
_is_deferred = False


class Stopped(BaseException):
    """A signal ended the work. A BaseException, so that no handler of failed runs catches it."""

    def __init__(self, number: int, line: str = "") -> None:
        super().__init__(line or f"interrupted by {signal.Signals(number).name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """Return the shell's exit code: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.number


def listen() -> None:
    """Install the handler of both signals; call it in the main thread."""
    for number in _SIGNALS:
        signal.signal(number, _on_signal)


def received_signal() -> int | None:
    """Return the signal received since `deferred` began, or None."""
    return _first_signal


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Record the first signal instead of raising; the code inside polls `asked` where it can stop.

    Raises:
        Stopped: At the end, if a signal was received.
    """
    global _is_deferred
    before, _is_deferred = _is_deferred, True
    try:
        yield
    finally:
        _is_deferred = before
    if _first_signal is not None and not _is_deferred:
        raise Stopped(_first_signal)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _first_signal, _first_time
    if _first_signal is not None:
        if time.monotonic() - _first_time > _SAME_SECONDS:
            os._exit(128 + number)
        return
    _first_signal, _first_time = number, time.monotonic()
    if not _is_deferred:
        raise Stopped(number)
    line = (
        f"{signal.Signals(number).name}: saving after the current step or validation; "
        "send it again to stop at once\n"
    )
    with contextlib.suppress(
        OSError
    ):  # the reader, such as `tee`, may have ended by the same signal
        os.write(sys.stderr.fileno(), line.encode())
