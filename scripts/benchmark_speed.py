"""Compare the engine's training speed with a plain PyTorch loop over the same tasks.

python scripts/benchmark_speed.py [--device DEVICE] [--repeats N] [--quick] [--rest]

Writes benchmarks/speed-<device>.json and .md:
- tasks per second (median, slowest and fastest of alternating repeats) of the plain loop, of each
  strategy, of the one that `engine.strategy=auto` picks, of that one in bf16, and of second-order
  MAML by `higher`, `torchopt` and `learn2learn` if they are installed;
- seconds for 1,000 test episodes, and from the command to the first step;
- peak memory for several numbers of inner steps and meta-batch sizes;
- the share of a step that is spent outside the model.

The plain loop does what the field's libraries do: one task after the other, with
`torch.func.functional_call` on the adapted weights, `torch.autograd.grad(create_graph=True)` for
the inner step, and `backward` of each task's query loss.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metalearn.algorithms.base import Algorithm
from metalearn.config import checking, composition
from metalearn.engine import replay
from metalearn.report.environment import describe_environment
from metalearn.run import loop
from metalearn.run.build import Run, build


def import_optional(name: str) -> Any:
    """Import a library; return None if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


LIBRARIES = ("higher", "torchopt", "learn2learn")
higher, torchopt, learn2learn = map(import_optional, LIBRARIES)
_OUT = Path(__file__).parent.parent / "benchmarks"


class PlainConv4(nn.Module):
    """Conv4 as an ordinary module, downsampled by stride or else by max-pooling."""

    def __init__(self, filters: int, stride: bool, mean: bool, way: int | None) -> None:
        super().__init__()
        self.stride, self.mean = stride, mean
        self.convs = nn.ModuleList(
            nn.Conv2d(
                filters if block else 1, filters, 3, 2 if stride else 1, padding=1, bias=False
            )
            for block in range(4)
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(filters, track_running_stats=False) for _ in range(4)
        )
        features = filters * (1 if mean or not stride else 4)
        self.head = nn.Linear(features, way) if way else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Embed images [B, 1, H, W], or classify them if `way` was given."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
            x = x if self.stride else F.max_pool2d(x, 2)
        return self.head(x.mean((-2, -1)) if self.mean else x.flatten(1))


def plain_gradient_step(run: Run, tasks: Any) -> Callable[[], None]:
    """Return a plain loop that runs one meta-step of MAML, first-order MAML or ANIL."""
    settings = run.config.algo
    model = PlainConv4(run.config.backbone["filters"], True, True, tasks.support.way).to(run.device)
    first_order, head_only = settings["first_order"], settings["adapted_part"] == "head"
    adapted = [
        name
        for name, _ in model.named_parameters()
        if name.startswith("head") or not (head_only or "norm" in name)
    ]

    def step() -> None:
        model.zero_grad()
        for task in range(tasks.key.shape[0]):
            weights: dict[str, torch.Tensor] = dict(model.named_parameters())
            for _ in range(settings["inner_steps"]):
                loss = F.cross_entropy(
                    functional_call(model, weights, tasks.support.x[task]), tasks.support.y[task]
                )
                gradients = torch.autograd.grad(
                    loss, [weights[name] for name in adapted], create_graph=not first_order
                )
                weights |= {
                    name: weights[name] - settings["inner_lr"] * gradient
                    for name, gradient in zip(adapted, gradients, strict=True)
                }
            loss = F.cross_entropy(
                functional_call(model, weights, tasks.query.x[task]), tasks.query.y[task]
            )
            (loss / tasks.key.shape[0]).backward()

    return step


def plain_metric_step(run: Run, tasks: Any) -> Callable[[], None]:
    """Return a plain loop that runs one meta-step of ProtoNet."""
    model = PlainConv4(run.config.backbone["filters"], False, False, None).to(run.device)

    def step() -> None:
        model.zero_grad()
        for task in range(tasks.key.shape[0]):
            shots = tasks.support.y.shape[1] // tasks.support.way
            order = tasks.support.y[task].argsort()
            z = model(torch.cat([tasks.support.x[task][order], tasks.query.x[task]]))
            means = z[: len(order)].unflatten(0, (tasks.support.way, shots)).mean(1)
            loss = F.cross_entropy(
                -torch.cdist(z[len(order) :], means).square(), tasks.query.y[task]
            )
            (loss / tasks.key.shape[0]).backward()

    return step


def library_steps(run: Run, tasks: Any) -> dict[str, Callable[[], None]]:
    """Return one meta-step of second-order MAML for each installed library, as in its examples."""
    settings, count = run.config.algo, tasks.key.shape[0]
    if settings.get("first_order") is not False or settings["adapted_part"] != "all":
        return {}
    rate, inner_steps = settings["inner_lr"], settings["inner_steps"]
    model = PlainConv4(run.config.backbone["filters"], True, True, tasks.support.way).to(run.device)
    support, query = (
        list(zip(part.x, part.y, strict=True)) for part in (tasks.support, tasks.query)
    )
    optimiser = torch.optim.SGD(model.parameters(), lr=rate)

    def with_higher() -> None:
        model.zero_grad()
        for task in range(count):
            with higher.innerloop_ctx(model, optimiser, copy_initial_weights=False) as (
                adapted,
                inner,
            ):
                for _ in range(inner_steps):
                    inner.step(F.cross_entropy(adapted(support[task][0]), support[task][1]))
                (F.cross_entropy(adapted(query[task][0]), query[task][1]) / count).backward()

    def with_torchopt() -> None:
        model.zero_grad()
        inner = torchopt.MetaSGD(model, lr=rate)
        weights, state = torchopt.extract_state_dict(model), torchopt.extract_state_dict(inner)
        for task in range(count):
            for _ in range(inner_steps):
                inner.step(F.cross_entropy(model(support[task][0]), support[task][1]))
            (F.cross_entropy(model(query[task][0]), query[task][1]) / count).backward()
            torchopt.recover_state_dict(model, weights)
            torchopt.recover_state_dict(inner, state)

    def with_learn2learn() -> None:
        model.zero_grad()
        maml = learn2learn.algorithms.MAML(model, lr=rate, first_order=False)
        for task in range(count):
            learner = maml.clone()
            for _ in range(inner_steps):
                learner.adapt(F.cross_entropy(learner(support[task][0]), support[task][1]))
            (F.cross_entropy(learner(query[task][0]), query[task][1]) / count).backward()

    steps = {"higher": (higher, with_higher), "torchopt": (torchopt, with_torchopt)}
    steps["learn2learn"] = (learn2learn, with_learn2learn)
    return {name: step for name, (module, step) in steps.items() if module is not None}


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


def rates(run: Run, repeats: int) -> dict[str, list[float]]:
    """Measure tasks per second of the plain loop, each strategy and the chosen one, alternating."""
    batch = run.config.train.meta_batch
    tasks, progress = run.train.draw(0, batch), torch.zeros((), device=run.device)
    plain = plain_gradient_step if "inner_steps" in run.config.algo else plain_metric_step
    strategies = ["loop", "vmap"] + (
        ["mixed"] if type(run.algorithm).loss is Algorithm.loss else []
    )
    steps: dict[str, Callable[[], Any]] = {"plain": plain(run, tasks)}
    for strategy in strategies:
        engine = dataclasses.replace(
            run.train_engine, strategy=strategy, chunk=run.config.engine.task_chunk
        ).resolve(run.train.draw(0, 1), batch, True)
        steps[strategy] = functools.partial(engine.step, run.state, tasks, progress)
    for name, engine in (
        ("auto", run.train_engine),
        ("bf16", dataclasses.replace(run.train_engine, precision="bf16")),
    ):
        steps[name] = functools.partial(
            engine.step, run.state, tasks, progress, replays=replay.Replays(print)
        )
    steps |= library_steps(run, tasks)
    replay._SECONDS = replay._CALLS = 0.0  # trace in the warm-up
    speeds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first is a warm-up
                speeds[name].append(batch / (time.perf_counter() - start))
    return speeds


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
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--quick", action="store_true", help="small batches, to test this script; writes nothing"
    )
    parser.add_argument(
        "--rest",
        action="store_true",
        help="measure everything but the tasks per second, which are read from the file",
    )
    parser.add_argument("--memory", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print_peak_memory(args.memory[1:], args.memory[0])
        return
    device, rows = args.device, []
    file = _OUT / f"speed-{device}.json"
    environment_of_rows = describe_environment(device)
    if args.rest:
        stored = json.loads(file.read_text())
        rows, environment_of_rows = stored["rows"], stored["environment"]
    for name, overrides in [] if args.rest else cases(args.quick):
        run = build_run(overrides, device)
        speeds = rates(run, args.repeats)
        medians = {key: statistics.median(values) for key, values in speeds.items()}
        rows.append(
            {
                "case": name,
                "chosen": run.train_engine.strategy,
                "chunk": run.train_engine.chunk,
                "tasks_per_second": medians,
                "slowest": {key: min(values) for key, values in speeds.items()},
                "fastest": {key: max(values) for key, values in speeds.items()},
                "speedup": medians["auto"] / medians["plain"],
            }
        )
        auto = f"auto ({run.train_engine.strategy}) {medians['auto']:.1f}"
        print(f"{name}: plain {medians['plain']:.1f}, {auto} tasks/s", flush=True)
    maml = build_run(["algo=maml", "episode.train.query=5", "train.meta_batch=8"], device)
    start = time.perf_counter()
    loop.test(maml, maml.state, None)
    content = {
        "environment": environment_of_rows,
        "rows": rows,
        "environment_of_the_rest": describe_environment(device),
        "test_seconds": time.perf_counter() - start,
        "test_episodes": maml.config.test.episodes,
        "first_step_seconds": first_step_seconds(device),
        "share_outside_model": share_outside_model(maml),
        "memory": [
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
            for steps, batch in ((1, 8), (5, 8), (20, 8), (1, 32), (1, 128))
        ],
    }
    if not args.quick:
        _OUT.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=1) + "\n")
        (_OUT / f"speed-{device}.md").write_text("\n".join(markdown(content, args.repeats)) + "\n")


def markdown(content: dict[str, Any], repeats: int) -> list[str]:
    """Return the lines of the Markdown file."""
    environment = content["environment"]
    lines = [
        "# Training speed",
        "",
        f"`make benchmark-speed`: tasks per second, median of {repeats} (slowest to fastest).",
        f"Commit {environment['commit']}, {environment['hardware']}, "
        f"torch {environment['versions']['torch']}.",
        "Conv4-64; MAML and its variants with stride 2 and spatial mean.",
        "",
        "| case | plain loop | loop | vmap | mixed | auto picks | auto / plain | auto in bf16 "
        "| libraries |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        cells = []
        for name in ("plain", "loop", "vmap", "mixed"):
            median = row["tasks_per_second"].get(name)
            cells.append(
                f"{median:.1f} ({row['slowest'][name]:.1f} to {row['fastest'][name]:.1f})"
                if median
                else ""
            )
        lines.append(
            f"| {row['case']} | {' | '.join(cells)} "
            f"| {row['chosen']}: {row['tasks_per_second']['auto']:.1f} "
            f"| {row['speedup']:.2f} | {row['tasks_per_second']['bf16']:.1f} | "
            + "; ".join(
                f"{name} {row['tasks_per_second'][name]:.1f}"
                for name in LIBRARIES
                if name in row["tasks_per_second"]
            )
            + " |"
        )
    rest = content["environment_of_the_rest"]
    lines += [
        "",
        *(
            [f"Measured at commit {rest['commit']}:", ""]
            if rest["commit"] != environment["commit"]
            else []
        ),
        f"- {content['test_episodes']:,} test episodes of MAML, 5w1s, 15 queries: "
        f"{content['test_seconds']:.1f} s",
        f"- from the command to the end of the first step, with cached data: "
        f"{content['first_step_seconds']:.1f} s",
        f"- share of a meta-step (MAML, 8 tasks, 5 queries) spent on sampling tasks and on the "
        f"optimiser: {content['share_outside_model']:.1%}",
        "- memory of one meta-step of MAML, 5 queries: "
        + "; ".join(
            f"{one['inner_steps']} inner steps, {one['meta_batch']} tasks"
            f"{', rematerialised' if one['rematerialise'] else ''} {one['mib']:.0f} MiB"
            for one in content["memory"]
        ),
    ]
    return lines


if __name__ == "__main__":
    main()
