"""Compare the engine's training speed with a plain PyTorch loop and with other libraries.

python scripts/benchmark_speed.py [--minutes M] [--only TEXT] [--quick] [--rest] [--out FOLDER]

Writes speed-<device>.json and .md to benchmarks/, within about M (22) minutes:
- tasks per second and CPU time per task of the plain loop, of each strategy, of the one that
  `engine.strategy=auto` picks, of that one in lower precision, and of `parallel-metalearn` and JAX,
  which run in environments that the script makes in outputs/rivals (`speed_rivals.py`);
- the error of each meta-gradient against the one in float64;
- the speed of the operators in C and in torch;
- seconds for test episodes, and from the command to the first step;
- peak memory for several numbers of inner steps and meta-batch sizes;
- the share of a step that is spent outside the model.

The samples of a case alternate. One during which other processes used more than a tenth of a core
is discarded, as long as three others remain. `higher` and `torchopt` are not measured again: their
speeds relative to the plain loop (`plain_loop.py`) are copied from the file that is replaced.
"""

import argparse
import functools
import json
import os
import re
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command does; also for rivals

import numpy as np
import speed_page
import torch
from plain_loop import Gradients, plain_step
from speed_rivals import PACKAGES, sample
from torch import Tensor
from torch.utils import _pytree as pytree

from metalearn.algorithms.base import Algorithm
from metalearn.config import checking, composition
from metalearn.engine import Engine, kernels, replay
from metalearn.report.environment import describe_environment
from metalearn.run import loop
from metalearn.run.build import Run, build
from metalearn.system import cores

Step = Callable[[], Gradients]
_ROOT = Path(__file__).parent.parent
#: Seconds of a sample, and for all that follows the table of speeds.
_SAMPLE, _REST = 0.25, 240.0
#: Quiet samples that are enough; and those that must remain, or noisy ones are used as well.
_ENOUGH, _LEAST = 9, 3
#: Cores that other processes may use during a quiet sample.
_QUIET = 0.1
#: Seconds that a rival may take for one answer.
_PATIENCE = 300.0


def cases(quick: bool) -> list[tuple[str, list[str]]]:
    """Return the name and the settings of each comparison."""
    rows = []
    for way, batch in ((5, 32), (20, 8)):
        for query in (1, 15):
            shape = [
                f"episode.way={way}",
                f"episode.train.query={query}",
                f"train.meta_batch={4 if quick else batch}",
            ]
            protocol = f"{way}w1s, {query} {'query' if query == 1 else 'queries'}"
            for name, overrides in (
                ("MAML, 1 step", ["algo=maml"]),
                ("first-order MAML, 1 step", ["algo=fomaml"]),
                ("MAML, 5 steps", ["algo=maml", "algo.inner_steps=5"]),
                ("first-order MAML, 5 steps", ["algo=fomaml", "algo.inner_steps=5"]),
                ("ANIL, 1 step", ["algo=anil"]),
                ("ProtoNet", ["algo=protonet"]),
            ):
                if way == 5 or "5 steps" not in name:
                    rows.append((f"{name}, {protocol}", [*overrides, *shape]))
    return rows


def build_run(overrides: list[str], device: str) -> Run:
    """Build a run on glyphs with the backbone of the Omniglot recipe."""
    stride = ["backbone.downsample=stride", "backbone.output=mean"]
    overrides = [
        "dataset=glyphs",
        "logger=none",
        f"device={device}",
        "episode.train.way=${episode.way}",
        *([] if "algo=protonet" in overrides else stride),
        *overrides,
    ]
    return build(checking.check_config(composition.compose_config(overrides)))


class Rival:
    """A library in an environment of its own; see `speed_rivals.py`."""

    def __init__(self, library: str, case: Path) -> None:
        script = Path(__file__).with_name("speed_rivals.py")
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.library = library
        self._process = subprocess.Popen(
            [_rival_python(library), str(script), library, str(case)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=case.parent,
            env=environment,
        )

    def ask(self, command: str) -> dict[str, Any]:
        """Return the answer to a command; raise RuntimeError if there is none."""
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        assert stdin is not None and stdout is not None and stderr is not None
        stdin.write(command + "\n")
        stdin.flush()
        if not select.select([stdout], [], [], _PATIENCE)[0]:
            self.close()
            raise RuntimeError(f"no answer in {_PATIENCE:.0f} s")
        line = stdout.readline()
        if not line:
            raise RuntimeError((stderr.read().strip().splitlines() or ["ended"])[-1])
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def _rival_python(library: str) -> str:
    """Return the interpreter of a library's environment; make the environment if it is missing."""
    name = re.sub(r"\W+", "-", PACKAGES[library][0])
    folder = _ROOT / "outputs" / "rivals" / name
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if uv is None:
            raise RuntimeError("requires uv: make setup")
        print(f"installing {PACKAGES[library][0]} in {folder.relative_to(_ROOT)}", flush=True)
        version = ".".join(map(str, sys.version_info[:2]))
        subprocess.run([uv, "venv", "-q", "--clear", "--python", version, folder], check=True)
        install = [uv, "pip", "install", "-q", "--python", str(python)]
        subprocess.run([*install, *PACKAGES[library]], check=True)
        (folder / ".ready").touch()
    return str(python)


def rivals(run: Run, tasks: Any, folder: Path) -> Iterator[Rival]:
    """Start the rivals that can compute a case: MAML, first-order MAML or ANIL on a CPU."""
    if "inner_steps" not in run.config.algo or run.device.type != "cpu":
        return
    case: Any = {
        f"param:{name}": value.detach().numpy() for name, value in run.state.params.items()
    }
    for name, part in (("support", tasks.support), ("query", tasks.query)):
        case |= {f"{name}_x": part.x.numpy(), f"{name}_y": part.y.numpy()}
    settings = json.dumps(run.config.algo | {"eps": run.config.backbone["eps"]})
    np.savez(folder / "case.npz", settings=np.array(settings), **case)
    for library in PACKAGES:
        try:
            yield Rival(library, folder / "case.npz")
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            print(f"  without {library}: {error}", flush=True)


def own_steps(run: Run, tasks: Any) -> dict[str, Step]:
    """Return the meta-gradient of the plain loop and of each form of the engine."""
    batch, progress = len(tasks.key), torch.zeros((), device=run.device)
    plain = plain_step(run)
    steps: dict[str, Step] = {"plain": lambda: plain(tasks)[0]}

    def add(name: str, engine: Engine) -> None:
        engine = engine.resolve(run.train.draw(0, 1), batch, True)
        # Traced after the first call, in the warm-up.
        replays = replay.Replays(lambda line: print(f"  {name}: {line}", flush=True))

        def step() -> Gradients:
            return engine.step(run.state, tasks, progress, replays=replays).gradients

        steps[name] = step

    chunk = run.config.engine.task_chunk
    names = ["loop", "vmap"] + (["mixed"] if type(run.algorithm).loss is Algorithm.loss else [])
    for name in names:
        add(name, Engine(run.algorithm, name, chunk, convolution="plain"))
    for precision in ("fp32", "mixed", "bf16"):
        if precision == "bf16" and run.algorithm.can_rematerialise:
            continue  # refused
        name = "auto" if precision == "fp32" else f"auto, {precision}"
        add(name, Engine(run.algorithm, "auto", chunk, precision, run.config.engine.convolution))
    return steps


def error(gradients: dict[str, Any], exact: Gradients) -> float:
    """Return the relative error |g - exact| / |exact| over all parameters."""
    square = sum(
        float((torch.as_tensor(gradients[name]).double().cpu() - value.cpu()).square().sum())
        for name, value in exact.items()
    )
    return float((square / sum(float(value.square().sum()) for value in exact.values())) ** 0.5)


def exact_gradients(run: Run, tasks: Any) -> Gradients:
    """Return the meta-gradient in float64, computed one task at a time."""
    state, tasks = pytree.tree_map(
        lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, (run.state, tasks)
    )
    progress = torch.zeros((), dtype=torch.float64, device=run.device)
    return Engine(run.algorithm, "loop", 1).step(state, tasks, progress).gradients


def measure(run: Run, seconds: float) -> dict[str, dict[str, Any]]:
    """Measure speed and gradient error of all variants of a case, alternating."""
    end, batch = time.monotonic() + seconds, run.config.train.meta_batch
    tasks = run.train.draw(0, batch)
    exact = exact_gradients(run, tasks)
    samplers: dict[str, Callable[[float], dict[str, float]]] = {}
    results: dict[str, dict[str, Any]] = {}

    def own(step: Step, seconds: float) -> dict[str, float]:
        def synchronised() -> None:
            step()
            if run.device.type == "cuda":
                torch.cuda.synchronize()

        return sample(synchronised, batch, seconds)

    replay._SECONDS = replay._CALLS = 0.0  # trace in the warm-up
    for name, step in own_steps(run, tasks).items():
        step()
        results[name] = {"error": error(step(), exact)}
        samplers[name] = functools.partial(own, step)
    with tempfile.TemporaryDirectory() as name:
        folder, started = Path(name), list[Rival]()
        try:
            for rival in rivals(run, tasks, folder):
                started.append(rival)
                try:
                    answer = rival.ask(f"gradient {folder / 'gradient.npz'}")
                except RuntimeError as reason:
                    print(f"  without {rival.library}: {reason}", flush=True)
                    continue
                gradients = dict(np.load(folder / "gradient.npz"))
                results[rival.library] = {"error": error(gradients, exact), **answer}
                samplers[rival.library] = functools.partial(_ask_for_sample, rival)
            for name, values in _sampled(samplers, end).items():
                results[name] |= values
        finally:
            for rival in started:
                rival.close()
    return results


def _ask_for_sample(rival: Rival, seconds: float) -> dict[str, float]:
    return rival.ask(f"sample {seconds}")


def _sampled(
    samplers: dict[str, Callable[[float], dict[str, float]]], end: float
) -> dict[str, dict[str, Any]]:
    """Take samples in turn until each has enough quiet ones or the time is over."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in samplers}
    rounds = 0
    while rounds < 2 or time.monotonic() < end:
        quiet = [sum(one["others"] < _QUIET for one in each) for each in samples.values()]
        if min(quiet) >= _ENOUGH:
            break
        for name, take in samplers.items():
            before = cores.usage()
            one = take(_SAMPLE)
            after = cores.usage()
            used = after.since(before) if before and after else None
            one["others"] = (used.all - one["cpu"]) / used.wall if used else 0.0
            if rounds:  # the first is a warm-up
                samples[name].append(one)
        rounds += 1
    return {name: _summary(each) for name, each in samples.items()}


def _summary(samples: list[dict[str, float]]) -> dict[str, Any]:
    """Return the medians of the quiet samples, or of all if there are too few of them."""
    quiet = [one for one in samples if one["others"] < _QUIET]
    used = quiet if len(quiet) >= _LEAST else samples
    speeds = [one["tasks"] / one["wall"] for one in used]
    return {
        "tasks_per_second": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "cpu_ms": statistics.median(1e3 * one["cpu"] / one["tasks"] for one in used),
        "samples": len(used),
        "discarded": len(samples) - len(used),
        "is_noisy": used is not quiet,
    }


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
    flops = 2 * 16 * 10 * 49 * 9 * 64 * 64  # with the padding, which the C code leaves out
    rows: dict[str, tuple[Any, tuple[Any, ...], int]] = {
        "convolution": (ops.conv, (x, w, 2), flops),
        "its gradient by inputs": (ops.conv_input, (gy, w, 14, 14, 2), flops),
        "its gradient by weights": (ops.conv_weight, (x, gy, 3, 2, 1), flops),
        "normalisation, activation": (ops.norm, (gy, g, b, 1e-5, 0.0), 0),
        "its gradient": (ops.norm_vjp, (gy, None, None, g, a, xh, r, 0.0, 1), 0),
        "its second derivative": (ops.norm_second, second, 0),
        "product of 2048 x 2048": (torch.mm, (square, square), 2 * 2048**3),
    }

    def milliseconds(function: Callable[..., Any], args: tuple[Any, ...]) -> float:
        function(*args)
        times = [sample(lambda: function(*args), 1, 0.02) for _ in range(10)]
        return min(1e3 * one["cpu"] / one["tasks"] for one in times)

    library, used = kernels.build._State.library, torch.get_num_threads()
    torch.set_num_threads(1)
    table = []
    for name, (function, args, count) in rows.items():
        row: dict[str, Any] = {"operator": name, "flops": count}
        for kind, loaded in (("c", library), ("torch", None)):
            is_own = function is not torch.mm
            if kind == "torch" or (is_own and library is not None):
                kernels.build._State.library = loaded
                row[kind] = milliseconds(function, args)
        table.append(row)
    kernels.build._State.library = library
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
    for number in range(3):
        start = time.perf_counter()
        command = [sys.executable, "-m", "metalearn", *args, f"device={device}"]
        process = subprocess.Popen(
            [*command, f"hydra.run.dir=/tmp/metalearn-speed-{time.time_ns()}-{number}"],
            stdout=subprocess.PIPE,
            text=True,
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
        [sys.executable, __file__, "--memory", device, *overrides],
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


def main() -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=22.0, help="for everything, about")
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument("--quick", action="store_true", help="small batches, to test this script")
    parser.add_argument(
        "--rest",
        action="store_true",
        help="measure everything but the table of speeds, which is read from the file",
    )
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks")
    parser.add_argument("--memory", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print_peak_memory(args.memory[1:], args.memory[0])
        return
    device, file = args.device, args.out / f"speed-{args.device}.json"
    end = time.monotonic() + 60 * args.minutes - _REST
    args.out.mkdir(exist_ok=True, parents=True)
    stored = json.loads(file.read_text()) if file.exists() else {}
    content: dict[str, Any] = {
        "environment": describe_environment(device),
        # Those of other cases stay.
        "rows": [
            row
            for row in stored.get("rows", [])
            if "is" in row and args.only and args.only not in row["case"]
        ],
        "earlier": stored.get("earlier") or _earlier(stored),
    }
    if args.rest:
        content |= {name: stored[name] for name in ("environment", "rows")}
    chosen = [] if args.rest else [one for one in cases(args.quick) if args.only in one[0]]
    for number, (name, overrides) in enumerate(chosen):
        run = build_run(overrides, device)
        variants = measure(run, (end - time.monotonic()) / (len(chosen) - number))
        content["rows"].append({"case": name, "engine": run.train_engine.choices, "is": variants})
        wall, cpu = speed_page.speedups(variants)
        print(
            f"{name}: {variants['auto']['tasks_per_second']:.1f} tasks/s, {wall:.2f} times the "
            f"plain loop, {cpu:.2f} by CPU time",
            flush=True,
        )
        _write(file, content)
    maml = build_run(["algo=maml", "episode.train.query=5", "train.meta_batch=8"], device)
    content["environment_of_the_rest"] = describe_environment(device)
    if device == "cpu":
        content["operators"] = operator_speeds()
    start = time.perf_counter()
    loop.test(maml, maml.state, None)
    content |= {
        "test_seconds": time.perf_counter() - start,
        "test_episodes": maml.config.test.episodes,
        "first_step_seconds": first_step_seconds(device),
        "share_outside_model": share_outside_model(maml),
        "memory": memories(device, args.quick),
    }
    _write(file, content)


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


def _earlier(stored: dict[str, Any]) -> dict[str, Any]:
    """Return the speeds of `higher` and `torchopt` over the plain loop's, from an older file."""
    rows = {}
    for row in stored.get("rows", []):
        speeds = row.get("tasks_per_second", {})
        ratios = {
            name: speeds[name] / speeds["plain"]
            for name in ("higher", "torchopt")
            if name in speeds
        }
        if ratios:
            rows[row["case"]] = ratios
    return {"commit": stored["environment"]["commit"], "rows": rows} if rows else {}


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")
    file.with_suffix(".md").write_text("\n".join(speed_page.lines(content)) + "\n")


if __name__ == "__main__":
    main()
