"""A whole meta-step as one CUDA graph."""

from collections.abc import Callable

import torch

from metalearn.errors import first_line

#: Plain calls before capture: they make what the graph then uses, such as the optimiser's moments.
_WARM_UP = 3


class Captured:
    """`step`, launched as one CUDA graph after a few plain calls; where that cannot be, called as it is.

    step: reads and writes tensors in place, always the same ones, and never waits for the device.
    stage: what else the step depends on; where that is another object than before, a graph is captured anew.
    why_not: a reason known beforehand not to capture, or None; `tell` gets it, or why the capture failed, once.
    """

    def __init__(
        self,
        step: Callable[[], None],
        stage: Callable[[], object],
        device: torch.device,
        why_not: str | None,
        tell: Callable[[str], None],
    ):
        self._step, self._stage, self._tell = step, stage, tell
        self._of_stage: object = None
        self._capturing = device.type == "cuda" and why_not is None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._plain_calls = 0
        if device.type == "cuda" and why_not is not None:
            tell(f"no CUDA graph: {why_not}")

    @property
    def captured(self) -> bool:
        """Whether the graph stands."""
        return self._graph is not None

    def __call__(self) -> None:
        if self._stage() is not self._of_stage:
            self._of_stage, self._graph, self._plain_calls = self._stage(), None, 0
        if self._graph is not None:
            self._graph.replay()
        elif not self._capturing:
            self._step()
        elif self._plain_calls < _WARM_UP:
            # On another stream, as capture wants it, so that nothing of the warm-up is bound to the usual one.
            self._plain_calls += 1
            side, usual = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(usual)
            with torch.cuda.stream(side):
                self._step()
            usual.wait_stream(side)
        else:
            self._capture()
            self()

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step()
        except RuntimeError as error:
            # A capture records and computes nothing, so the step is as undone as before.
            self._capturing = False
            self._tell(f"no CUDA graph: capture failed ({first_line(error)})")
        else:
            self._graph = graph
