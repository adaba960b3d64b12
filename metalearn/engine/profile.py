"""`engine.profile=true`: where the time of a few meta-steps goes, as a trace and as one page."""

import time
from pathlib import Path
from typing import Any

import torch

#: Steps that are let pass first, and that are profiled then.
_WARM_UP, _STEPS = 5, 5
#: Operations named on the page.
_OPERATIONS = 20
#: The parts of a meta-step, as `torch.profiler.record_function` names them in the loop.
PARTS = ("draw tasks", "gradients", "optimiser")


class Profile:
    """Told of every step; writes `profile/trace.json.gz` and `profile/summary.md` under `folder` when it has seen enough."""

    def __init__(
        self, folder: Path, device: torch.device, steps: int, meta_batch: int, header: str
    ) -> None:
        self._folder, self._device, self._meta_batch, self._header = (
            folder / "profile",
            device,
            meta_batch,
            header,
        )
        self._first = min(_WARM_UP, steps // 2)
        self._last = min(self._first + _STEPS, steps)
        self._profiler: Any = None
        self._clock = 0.0

    def before(self, step: int) -> None:
        """step: the number of the step to come, from 0."""
        if step != self._first:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.reset_peak_memory_stats()
        self._profiler = torch.profiler.profile(activities=activities)
        self._synchronise()
        self._profiler.start()
        self._clock = time.perf_counter()

    def after(self, step: int) -> None:
        """step: the number of the step that is done, from 0."""
        if (
            self._profiler is None or step + 1 != self._last
        ):  # a run that is gone on with may have missed the first
            return
        self._synchronise()
        seconds = time.perf_counter() - self._clock
        self._profiler.stop()
        self._folder.mkdir(exist_ok=True)
        self._profiler.export_chrome_trace(str(self._folder / "trace.json.gz"))
        (self._folder / "summary.md").write_text("\n".join(self._page(seconds)) + "\n")

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _page(self, seconds: float) -> list[str]:
        steps = self._last - self._first
        averages = self._profiler.key_averages()
        cuda = self._device.type == "cuda"

        def own(event: Any) -> float:
            return event.self_device_time_total if cuda else event.self_cpu_time_total

        # On a GPU an operator and its kernels both carry the kernels' time, so kernels alone are counted.
        kernels = (
            [event for event in averages if str(event.device_type).endswith("CUDA")]
            if cuda
            else averages
        )
        operations = [event for event in kernels if event.key not in PARTS and own(event) > 0]
        operations.sort(key=own, reverse=True)
        whole = sum(map(own, operations))
        lines = [
            "# Where the time of a meta-step goes",
            "",
            f"{self._header}. Steps {self._first + 1} to {self._last}, under the profiler, which slows them down.",
            "",
            f"- {1e3 * seconds / steps:.1f} ms a step, {self._meta_batch * steps / seconds:.1f} tasks/s",
            f"- {sum(event.count for event in operations) / steps:.0f} operations a step",
        ]
        parts = {
            event.key: event.cpu_time_total / 1e6
            for event in averages
            if event.key in PARTS and event.cpu_time_total
        }
        if parts:  # one captured graph has none
            shown = ", ".join(
                f"{name} {parts[name] / seconds:.1%}" for name in PARTS if name in parts
            )
            lines.append(f"- share of the time on the host: {shown}")
        if cuda:
            lines.append(f"- peak memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
            lines.append(f"- device busy {whole / 1e6 / seconds:.0%} of the time")
        lines += [
            "",
            f"| operation | ms a step | share of {'device' if cuda else 'host'} time | calls a step |",
        ]
        lines.append("| --- | --- | --- | --- |")
        lines += [
            f"| `{event.key}` | {own(event) / 1e3 / steps:.2f} | {own(event) / whole:.1%} | {event.count / steps:.0f} |"
            for event in operations[:_OPERATIONS]
        ]
        lines += ["", "`trace.json.gz` opens in https://ui.perfetto.dev."]
        return lines
