"""Profile a few meta-steps (`engine.profile=true`) and write a trace and a summary page."""

import time
from pathlib import Path
from typing import Any

import torch

from metalearn.engine.capture import synchronise

#: Number of unprofiled steps first, then of profiled steps.
_WARM_UP, _STEPS = 5, 5
#: Number of operations in the summary.
_OPERATIONS = 20
#: Parts of a meta-step, named in the training loop by `torch.profiler.record_function`.
PARTS = ("draw tasks", "gradients", "optimiser")


class Profile:
    """Profile training steps and write trace.json.gz and summary.md to `folder`/profile."""

    def __init__(
        self, folder: Path, device: torch.device, steps: int, meta_batch: int, header: str
    ) -> None:
        self._folder, self._device = folder / "profile", device
        self._meta_batch, self._header = meta_batch, header
        self._first = min(_WARM_UP, steps // 2)
        self._last = min(self._first + _STEPS, steps)
        self._profiler: Any = None
        self._clock = 0.0

    def before(self, step: int) -> None:
        """Start the profiler if `step`, counted from 0, is the first to profile."""
        if step != self._first:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.reset_peak_memory_stats()
        self._profiler = torch.profiler.profile(activities=activities)
        synchronise(self._device)
        self._profiler.start()
        self._clock = time.perf_counter()

    def after(self, step: int) -> None:
        """Stop the profiler and write the files if `step`, counted from 0, is the last one."""
        # A resumed run may have missed the first step.
        if self._profiler is None or step + 1 != self._last:
            return
        synchronise(self._device)
        seconds = time.perf_counter() - self._clock
        self._profiler.stop()
        self._folder.mkdir(exist_ok=True)
        self._profiler.export_chrome_trace(str(self._folder / "trace.json.gz"))
        (self._folder / "summary.md").write_text("\n".join(self._page(seconds)) + "\n")

    def _page(self, seconds: float) -> list[str]:
        steps = self._last - self._first
        averages = self._profiler.key_averages()
        cuda = self._device.type == "cuda"

        def self_time(event: Any) -> float:
            return event.self_device_time_total if cuda else event.self_cpu_time_total

        # On a GPU, an operator and its kernels both report the kernels' time, so count kernels.
        operations = [
            event
            for event in averages
            if event.key not in PARTS and self_time(event) > 0
            if not cuda or str(event.device_type).endswith("CUDA")
        ]
        operations.sort(key=self_time, reverse=True)
        total = sum(map(self_time, operations))
        lines = [
            "# Time of a meta-step",
            "",
            f"{self._header}. Steps {self._first + 1} to {self._last}. "
            "The profiler slows them down.",
            "",
            f"- {1e3 * seconds / steps:.1f} ms per step, "
            f"{self._meta_batch * steps / seconds:.1f} tasks/s",
            f"- {sum(event.count for event in operations) / steps:.0f} operations per step",
        ]
        parts = {
            event.key: event.cpu_time_total / 1e6
            for event in averages
            if event.key in PARTS and event.cpu_time_total
        }
        if parts:  # a captured graph has no parts
            shown = (f"{name} {parts[name] / seconds:.1%}" for name in PARTS if name in parts)
            lines.append(f"- share of host time: {', '.join(shown)}")
        if cuda:
            lines.append(f"- peak memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
            lines.append(f"- device busy {total / 1e6 / seconds:.0%} of the time")
        share = f"share of {'device' if cuda else 'host'} time"
        lines += ["", f"| operation | ms per step | {share} | calls per step |"]
        lines.append("| --- | --- | --- | --- |")
        lines += [
            f"| `{event.key}` | {self_time(event) / 1e3 / steps:.2f} "
            f"| {self_time(event) / total:.1%} | {event.count / steps:.0f} |"
            for event in operations[:_OPERATIONS]
        ]
        lines += ["", "Open `trace.json.gz` in https://ui.perfetto.dev."]
        return lines
