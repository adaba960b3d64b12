"""Capture a meta-step as one CUDA graph."""

import time
from collections.abc import Callable

import torch

from metalearn.system.errors import first_line

#: Plain calls before capture; they allocate tensors that the graph uses, e.g. optimiser moments.
_WARM_UP = 3


class Captured:
    """Run `step` as one CUDA graph after a few plain calls, or plainly where capture is impossible.

    Args:
        step: Reads and writes the same tensors in place at each call, and never waits for the
            device.
        stage: Returns an object that the step depends on; a different object causes a new capture.
        device: Device of the tensors; only CUDA steps are captured.
        reason_not_captured: A known reason not to capture, or None.
        report: Called once with `reason_not_captured`, or with the reason why the capture failed.
    """

    def __init__(
        self,
        step: Callable[[], object],
        stage: Callable[[], object],
        device: torch.device,
        reason_not_captured: str | None,
        report: Callable[[str], None],
    ):
        self._step, self._stage, self._report = step, stage, report
        self._graph_stage: object = None
        self._capturing = device.type == "cuda" and reason_not_captured is None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._plain_calls = 0
        if device.type == "cuda" and reason_not_captured is not None:
            report(f"no CUDA graph: {reason_not_captured}")

    def __call__(self) -> None:
        """Take one step."""
        if self._stage() is not self._graph_stage:
            self._graph_stage, self._graph, self._plain_calls = self._stage(), None, 0
        if self._graph is not None:
            self._graph.replay()
        elif not self._capturing:
            self._step()
        elif self._plain_calls < _WARM_UP:
            # Capture requires the warm-up on a side stream, not on the default one.
            self._plain_calls += 1
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                self._step()
            current.wait_stream(side)
        else:
            self._capture()
            self()

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step()
        except RuntimeError as error:
            # A capture records but computes nothing, so the next call can take this step plainly.
            self._capturing = False
            self._report(f"no CUDA graph: capture failed ({first_line(error)})")
        else:
            self._graph = graph


def fastest_seconds(step: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of 3 calls, after those that `Captured` captures in."""

    def seconds() -> float:
        synchronise(device)
        start = time.perf_counter()
        step()
        synchronise(device)
        return time.perf_counter() - start

    for _ in range(_WARM_UP + 1):
        step()
    return min(seconds() for _ in range(3))


def synchronise(device: torch.device) -> None:
    """Wait until a device has computed everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
