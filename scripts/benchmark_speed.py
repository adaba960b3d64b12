"""Compare the engine's training speed with a plain PyTorch loop and with other libraries.

python scripts/benchmark_speed.py [--minutes M] [--only TEXT] [--quick] [--rest] [--out FOLDER]

Writes speed-<device>.json and .md to benchmarks/, within about M (40) minutes:
- tasks per second and CPU time per task of the plain loop, of each strategy, of the one that
  `engine.strategy=auto` picks, and of `parallel-metalearn` and JAX in environments that the script
  makes in outputs/rivals (`speed_rivals.py`);
- the error of each meta-gradient against the one in float64;
- what `speed_rest.py` measures.

Each of them runs as its user would run it: the engine with passive waiting of threads, as the
command sets it; the plain loop and the libraries in processes of their own, with torch's defaults.
The samples of a case alternate, and a process is stopped while others are sampled. A sample during
which other processes used more than a tenth of a core is discarded, as long as three others remain.
`higher` and `torchopt` are not measured again: their speeds relative to the plain loop
(`plain_loop.py`) are copied from the file that is replaced. CIFAR-FS is left out if it is not in
the data folder.
"""

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command does

import numpy as np
import speed_page
import speed_rest
import torch
from plain_loop import Gradients, build_run
from rival_processes import Rival, start_rivals
from speed_rivals import sample
from torch.utils import _pytree as pytree

from metalearn.algorithms.base import Algorithm
from metalearn.engine import Engine, replay
from metalearn.report.environment import describe_environment
from metalearn.run.build import Run
from metalearn.system import cores
from metalearn.system.errors import UserError

Step = Callable[[], Gradients]
_ROOT = Path(__file__).parent.parent
#: Seconds of a sample, and for all that follows the table of speeds.
_SAMPLE, _REST = 0.25, 240.0
#: Quiet samples that are enough; and those that must remain, or noisy ones are used as well.
_ENOUGH, _LEAST = 9, 3
#: Seconds of a step from which one sample is enough, so that the others have some in their time.
_SLOW = 4.0
#: Cores that other processes may use during a quiet sample.
_QUIET = 0.1


def cases(quick: bool) -> list[tuple[str, list[str]]]:
    """Return the name and the settings of each comparison."""
    rows = []
    for way, batch in ((5, 32), (20, 8)):
        for query in (1, 15):
            shape = [f"episode.way={way}", *_training(query, 4 if quick else batch)]
            protocol = f"{way}w1s, {query} {'query' if query == 1 else 'queries'}"
            for name, overrides in (
                ("MAML, 1 step", ["algo=maml"]),
                ("first-order MAML, 1 step", ["algo=fomaml"]),
                ("MAML, 5 steps", ["algo=maml", "algo.inner_steps=5"]),
                ("first-order MAML, 5 steps", ["algo=fomaml", "algo.inner_steps=5"]),
                ("ANIL, 1 step", ["algo=anil"]),
                ("ProtoNet", ["algo=protonet"]),
            ):
                if way == 5 or name in ("MAML, 1 step", "ProtoNet"):
                    rows.append((f"{name}, {protocol}", [*overrides, *shape]))
    for name, algo in (("MAML, 1 step", "maml"), ("ProtoNet", "protonet")):
        words = [f"algo={algo}", "dataset=cifar_fs", *_training(15, 4 if quick else 8)]
        steps = ["algo.inner_steps=1"] if algo == "maml" else []
        rows.append((f"{name}, CIFAR-FS, 5w1s, 15 queries", [*words, *steps]))
    return rows


def _training(query: int, batch: int) -> list[str]:
    return [f"episode.train.query={query}", f"train.meta_batch={batch}"]


def own_steps(run: Run, tasks: Any) -> dict[str, Step]:
    """Return the meta-gradient of each form of the engine."""
    batch, progress = len(tasks.key), torch.zeros((), device=run.device)
    chunk, steps = run.config.engine.task_chunk, dict[str, Step]()

    def make(name: str, engine: Engine) -> Step:
        engine = engine.resolve(run.train.draw(0, 1), batch, True)
        # Traced after the first call, in the warm-up.
        replays = replay.Replays(lambda line: print(f"  {name}: {line}", flush=True))
        return lambda: engine.step(run.state, tasks, progress, replays=replays).gradients

    names = ["loop", "vmap"] + (["mixed"] if type(run.algorithm).loss is Algorithm.loss else [])
    for name in names:
        steps[name] = make(name, Engine(run.algorithm, name, chunk, convolution="plain"))
    auto = Engine(run.algorithm, "auto", chunk, convolution=run.config.engine.convolution)
    steps["auto"] = make("auto", auto)
    if run.device.type == "cpu":
        with speed_rest.without_compiler():
            step = make("no compiler", auto)
        steps["no compiler"] = _within(speed_rest.without_compiler, step)
        for name in ("auto", "no compiler"):
            steps[f"{name}, 1 thread"] = _within(_one_thread, steps[name])
    return steps


def _within(context: Callable[[], AbstractContextManager[None]], step: Step) -> Step:
    def inside() -> Gradients:
        with context():
            return step()

    return inside


@contextmanager
def _one_thread() -> Iterator[None]:
    used = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(used)


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


def measure(run: Run, overrides: list[str], seconds: float) -> dict[str, dict[str, Any]]:
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
            for rival in start_rivals(run, tasks, overrides, folder):
                started.append(rival)
                try:
                    answer = rival.ask(f"gradient {folder / 'gradient.npz'}")
                except RuntimeError as reason:
                    print(f"  without {rival.library}: {reason}", flush=True)
                    continue
                gradients = dict(np.load(folder / "gradient.npz"))
                results[rival.library] = {"error": error(gradients, exact), **answer}
                samplers[rival.library] = rival.sample
            for name, values in _sampled(samplers, end).items():
                results[name] |= values
        finally:
            for rival in started:
                rival.close()
    return results


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
            if samples[name] and samples[name][0]["wall"] > _SLOW:
                continue
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


def main() -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=40.0, help="for everything, about")
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument("--quick", action="store_true", help="small batches, to test this script")
    parser.add_argument(
        "--rest",
        action="store_true",
        help="measure everything but the table of speeds, which is read from the file",
    )
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks")
    args = parser.parse_args()
    device, file = args.device, args.out / f"speed-{args.device}.json"
    end = time.monotonic() + 60 * args.minutes - _REST
    args.out.mkdir(exist_ok=True, parents=True)
    stored = json.loads(file.read_text()) if file.exists() else {}
    content: dict[str, Any] = {
        "environment": describe_environment(device),
        # Those of other cases stay.
        "rows": [
            {"commit": stored["environment"]["commit"], **row}
            for row in stored.get("rows", [])
            if "is" in row and args.only and args.only not in row["case"]
        ],
        "earlier": stored.get("earlier") or _earlier(stored),
    }
    if args.rest:
        content |= {name: stored[name] for name in ("environment", "rows")}
    chosen = [] if args.rest else [one for one in cases(args.quick) if args.only in one[0]]
    for number, (name, overrides) in enumerate(chosen):
        try:
            run = build_run(overrides, device)
        except UserError as error:  # CIFAR-FS is missing
            print(f"without {name}: {error}", flush=True)
            continue
        left = (end - time.monotonic()) / (len(chosen) - number)
        variants = measure(run, overrides, left)
        row = {"case": name, "engine": run.train_engine.choices, "is": variants}
        content["rows"].append(row | {"commit": content["environment"]["commit"]})
        order = [one for one, _ in cases(args.quick)]
        content["rows"].sort(key=lambda row: order.index(row["case"]))
        wall, cpu = speed_page.speedups(variants, "auto")
        print(
            f"{name}: {variants['auto']['tasks_per_second']:.1f} tasks/s, {wall:.2f} times the "
            f"plain loop, {cpu:.2f} by CPU time",
            flush=True,
        )
        _write(file, content)
    _write(file, content | speed_rest.measure(device, args.quick))


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
