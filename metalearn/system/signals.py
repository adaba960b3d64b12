"""Handle SIGTERM and SIGINT.

The first signal ends a run where it can next be saved, the second ends it at once.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: Signals this soon after the first have the same cause, as when a launcher forwards a signal
#: that all processes receive.
_SAME_SECONDS = 0.5
_first_signal: int | None = None
_first_time = 0.0
_is_deferred = False


def _print_line(line: str) -> None:
    # The reader, such as `tee`, may have ended by the same signal.
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


_announce: Callable[[str], None] = _print_line


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
    """Record the first signal instead of raising; the code inside polls `received_signal`.

    Raise Stopped at the end if a signal was received.
    """
    global _is_deferred
    before, _is_deferred = _is_deferred, True
    try:
        yield
    finally:
        _is_deferred = before
    if _first_signal is not None and not _is_deferred:
        raise Stopped(_first_signal)


@contextlib.contextmanager
def raised_at_once() -> Iterator[None]:
    """Inside `deferred`: raise Stopped as soon as a signal is received, or was received before."""
    global _is_deferred
    before, _is_deferred = _is_deferred, False
    try:
        if _first_signal is not None:
            raise Stopped(_first_signal)
        yield
    finally:
        _is_deferred = before


@contextlib.contextmanager
def announced_by(announce: Callable[[str], None]) -> Iterator[None]:
    """Give the line about a deferred signal to a function instead of printing it.

    It is called inside the signal handler, so it must only store the line.
    """
    global _announce
    before, _announce = _announce, announce
    try:
        yield
    finally:
        _announce = before


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _first_signal, _first_time
    if _first_signal is not None:
        if time.monotonic() - _first_time > _SAME_SECONDS:
            os._exit(128 + number)
        return
    _first_signal, _first_time = number, time.monotonic()
    if not _is_deferred:
        raise Stopped(number)
    _announce(
        f"{signal.Signals(number).name}: saving after this step; send it again to stop at once"
    )
