"""What `benchmark_speed.py` measures beside the table: operators, start-up, tests, memory.

python scripts/speed_rest.py DEVICE SETTING... prints the MiB that one meta-step needs.
"""

import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from plain_loop import build_run
from speed_rivals import sample
from torch import Tensor

from metalearn.engine import kernels
from metalearn.report.environment import describe_environment
from metalearn.run import scoring
from metalearn.run.build import Run


def measure(device: str, quick: bool) -> dict[str, Any]:
    """Measure everything: a few minutes."""
    maml = build_run(["algo=maml", "episode.train.query=5", "train.meta_batch=8"], device)
    start = time.perf_counter()
    scoring.test(maml, maml.state, None)
    return {
        "environment_of_the_rest": describe_environment(device),
        "test_seconds": time.perf_counter() - start,
        "test_episodes": maml.config.test.episodes,
        **({"operators": operator_speeds()} if device == "cpu" else {}),
        "first_step_seconds": first_step_seconds(device),
        "share_outside_model": share_outside_model(maml),
        "memory": memories(device, quick),
    }


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Compute without the operators in C, as where there is no compiler."""
    library = kernels.build._State.library
    kernels.build._State.library = None
    try:
        yield
    finally:
        kernels.build._State.library = library


def operator_speeds() -> list[dict[str, Any]]:
    """Time the operators on the second block of Conv4-64 for 16 tasks of 10 images, on one core."""
    ops, generator = torch.ops.metalearn, torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, w, gy = normal(16, 10, 14, 14, 64), normal(16, 3, 3, 64, 64), normal(16, 10, 7, 7, 64)
    g, b = normal(16, 64), normal(16, 64)
    a, xh, r = ops.norm(gy, g, b, 1e-5, 0.0)
    second = (gy, g, b, gy, g, a, xh, r, 0.0, 1)
    square = normal(2048, 2048)
    flops = 2 * 16 * 10 * 49 * 9 * 64 * 64  # with all that the C code leaves out
    rows: dict[str, tuple[Any, tuple[Any, ...], int]] = {
        "convolution": (ops.conv, (x, w, 2), flops),
        "its gradient by inputs": (ops.conv_input, (gy, w, 14, 14, 2), flops),
        "its gradient by weights": (ops.conv_weight, (x, gy, 3, 2, 1), flops),
        "convolution, stride 1": (ops.conv, (x, w, 1), 4 * flops),
        "its gradient by inputs, stride 1": (ops.conv_input, (x, w, 14, 14, 1), 4 * flops),
        "its gradient by weights, stride 1": (ops.conv_weight, (x, x, 3, 1, 1), 4 * flops),
        "normalisation, activation": (ops.norm, (gy, g, b, 1e-5, 0.0), 0),
        "its gradient": (ops.norm_vjp, (gy, None, None, g, a, xh, r, 0.0, 1), 0),
        "its second derivative": (ops.norm_second, second, 0),
        "product of 2048 x 2048": (torch.mm, (square, square), 2 * 2048**3),
    }

    def milliseconds(function: Callable[..., Any], args: tuple[Any, ...]) -> float:
        function(*args)
        times = [sample(lambda: function(*args), 1, 0.02) for _ in range(10)]
        return min(1e3 * one["cpu"] / one["tasks"] for one in times)

    used, table = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for name, (function, args, count) in rows.items():
        row: dict[str, Any] = {"operator": name, "flops": count}
        if function is not torch.mm and kernels.build.library() is not None:
            row["c"] = milliseconds(function, args)
        with without_compiler():
            row["torch"] = milliseconds(function, args)
        table.append(row)
    torch.set_num_threads(used)
    return table


def first_step_seconds(device: str) -> float:
    """Measure seconds from the command to the end of the first step, cached data, median of 3."""
    args = [
        "train",
        "algo=maml",
        "dataset=glyphs",
        "logger=none",
        "train.steps=1",
        "val.episodes=2",
        "test.episodes=2",
    ]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        command = [sys.executable, "-m", "metalearn", *args, f"device={device}"]
        with tempfile.TemporaryDirectory() as folder:
            process = subprocess.Popen(
                [*command, f"hydra.run.dir={folder}/run"], stdout=subprocess.PIPE, text=True
            )
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("step"):
                    seconds.append(time.perf_counter() - start)
            process.wait()
    return statistics.median(seconds)


def peak_memory(overrides: list[str], device: str) -> float:
    """Measure, in its own process, the MiB that one meta-step needs beyond the built run."""
    done = subprocess.run(
        [sys.executable, __file__, device, *overrides],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.splitlines()[-1])


def print_peak_memory(overrides: list[str], device: str) -> None:
    """Print the MiB that one meta-step needs in this process."""
    run = build_run(overrides, device)
    tasks = run.train.draw(0, run.config.train.meta_batch)
    if run.device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _memory(run.device)
    run.train_engine.step(run.state, tasks, torch.zeros((), device=run.device))
    print(_memory(run.device) - before)


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def share_outside_model(run: Run) -> float:
    """Measure the share of a meta-step spent on sampling tasks and on the optimiser."""
    batch = run.config.train.meta_batch
    optimiser = torch.optim.Adam(list(run.state.params.values()))
    seconds = {"outside": 0.0, "model": 0.0}
    for number in range(6):
        times = [time.perf_counter()]
        tasks = run.train.draw(number * batch, batch)
        times.append(time.perf_counter())
        result = run.train_engine.step(run.state, tasks, torch.zeros((), device=run.device))
        times.append(time.perf_counter())
        for leaf, gradient in zip(
            run.state.params.values(), result.gradients.values(), strict=True
        ):
            leaf.grad = gradient
        optimiser.step()
        times.append(time.perf_counter())
        if number:
            seconds["outside"] += times[1] - times[0] + times[3] - times[2]
            seconds["model"] += times[2] - times[1]
    return seconds["outside"] / (seconds["outside"] + seconds["model"])


def memories(device: str, quick: bool) -> list[dict[str, Any]]:
    """Measure the peak memory of a meta-step for several sizes."""
    sizes = ((1, 8), (5, 8), (20, 8), (1, 32), (1, 128))
    return [
        {
            "inner_steps": steps,
            "meta_batch": batch,
            "rematerialise": rematerialise,
            "mib": peak_memory(
                [
                    "algo=maml",
                    f"algo.inner_steps={steps}",
                    f"train.meta_batch={batch}",
                    "episode.train.query=5",
                    f"engine.rematerialise={rematerialise}",
                ],
                device,
            ),
        }
        for rematerialise in (False, True)
        for steps, batch in sizes[: 1 if quick else None]
    ]


if __name__ == "__main__":
    print_peak_memory(sys.argv[2:], sys.argv[1])
