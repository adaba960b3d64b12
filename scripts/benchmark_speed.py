"""Training speed of the engine against a plain PyTorch loop over tasks, on the same tasks, in the same run.

Writes benchmarks/speed-<device>.json and .md: tasks a second, median of alternating repeats with the slowest and the
fastest, for the plain loop, for each strategy, what `engine.strategy=auto` picks, that in bf16, and second-order MAML by
`higher`, `torchopt` and `learn2learn` where they are installed; seconds of 1,000 test episodes; seconds from the command to
the first step; peak memory against inner steps and against the meta-batch; and the share of a step that is not the model.

The plain loop is what the field's libraries do: one task after the other, an `nn.Module` run through
`torch.func.functional_call` with the adapted weights, `torch.autograd.grad(create_graph=True)` for the inner step, and
`backward` of each task's query loss.
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
from metalearn.report.environment import describe_environment
from metalearn.run import loop
from metalearn.run.build import Run, build


def installed(name: str) -> Any:
    """The library, or None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


LIBRARIES = ("higher", "torchopt", "learn2learn")
higher, torchopt, learn2learn = map(installed, LIBRARIES)
_OUT = Path(__file__).parent.parent / "benchmarks"


class PlainConv4(nn.Module):
    """The same network as an ordinary module. stride: halves by the convolution, else by max-pooling."""

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
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
            x = x if self.stride else F.max_pool2d(x, 2)
        return self.head(x.mean((-2, -1)) if self.mean else x.flatten(1))


def plain_gradient_step(run: Run, tasks: Any) -> Callable[[], None]:
    """One meta-step of MAML, first-order MAML or ANIL over tasks, as a plain loop."""
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
    """One meta-step of ProtoNet over tasks, as a plain loop."""
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
    """One meta-step of second-order MAML by each of the field's libraries that is installed, as its examples write it."""
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

    found = {"higher": (higher, with_higher), "torchopt": (torchopt, with_torchopt)}
    found["learn2learn"] = (learn2learn, with_learn2learn)
    return {name: step for name, (module, step) in found.items() if module is not None}


def cases(quick: bool) -> list[tuple[str, list[str]]]:
    """Name and settings of each comparison."""
    found = []
    for way, batch in ((5, 32), (20, 8)):
        for query in (1, 15):
            shape = [
                f"episode.way={way}",
                f"episode.train.query={query}",
                f"train.meta_batch={4 if quick else batch}",
            ]
            at = f"{way}w1s, {query} {'query' if query == 1 else 'queries'}"
            for name, words in (
                ("MAML, 1 step", ["algo=maml"]),
                ("first-order MAML, 1 step", ["algo=fomaml"]),
                ("MAML, 5 steps", ["algo=maml", "algo.inner_steps=5"]),
                ("first-order MAML, 5 steps", ["algo=fomaml", "algo.inner_steps=5"]),
                ("ANIL, 1 step", ["algo=anil"]),
                ("ProtoNet", ["algo=protonet"]),
            ):
                if way == 5 or "5 steps" not in name:
                    found.append((f"{name}, {at}", [*words, *shape]))
    return found


def made(words: list[str], device: str) -> Run:
    """A run on glyphs, with the recipe's backbone of Omniglot."""
    stride = (
        [] if "algo=protonet" in words else ["backbone.downsample=stride", "backbone.output=mean"]
    )
    words = [
        "dataset=glyphs",
        "logger=none",
        f"device={device}",
        "episode.train.way=${episode.way}",
        *stride,
        *words,
    ]
    return build(checking.checked(composition.composed(words)))


def rates(run: Run, repeats: int) -> dict[str, list[float]]:
    """Tasks a second of the plain loop, of each strategy and of the one chosen, alternating."""
    batch = run.config.train.meta_batch
    tasks, progress = run.train.draw(0, batch), torch.zeros((), device=run.device)
    plain = plain_gradient_step if "inner_steps" in run.config.algo else plain_metric_step
    strategies = ["loop", "vmap"] + (
        ["mixed"] if type(run.algorithm).loss is Algorithm.loss else []
    )
    steps: dict[str, Callable[[], Any]] = {"plain": plain(run, tasks)}
    for strategy in strategies:
        free = dataclasses.replace(
            run.train_engine, strategy=strategy, chunk=run.config.engine.task_chunk
        )
        settled = free.resolved(run.train.draw(0, 1), batch, True)
        steps[strategy] = functools.partial(settled.step, run.state, tasks, progress)
    for name, engine in (
        ("auto", run.train_engine),
        ("bf16", dataclasses.replace(run.train_engine, precision="bf16")),
    ):
        steps[name] = functools.partial(engine.step, run.state, tasks, progress)
    steps |= library_steps(run, tasks)
    found: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first warms up
                found[name].append(batch / (time.perf_counter() - start))
    return found


def first_step_seconds(device: str) -> float:
    """From the command to the end of the first training step, data in the cache; the median of three."""
    words = [
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
        command = [sys.executable, "-m", "metalearn", *words, f"device={device}"]
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


def peak_memory(words: list[str], device: str) -> float:
    """MiB that one meta-step needs beyond what building the run needs, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--memory", device, *words],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.splitlines()[-1])


def print_peak_memory(words: list[str], device: str) -> None:
    run = made(words, device)
    tasks = run.train.draw(0, run.config.train.meta_batch)
    if run.device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _memory(run.device)
    run.train_engine.step(run.state, tasks, torch.zeros((), device=run.device))
    print(_memory(run.device) - before)


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def share_outside_model(run: Run) -> float:
    """Share of a meta-step that draws tasks and steps the optimiser."""
    batch = run.config.train.meta_batch
    optimiser = torch.optim.Adam(list(run.state.params.values()))
    spent = {"outside": 0.0, "model": 0.0}
    for number in range(6):
        marks = [time.perf_counter()]
        tasks = run.train.draw(number * batch, batch)
        marks.append(time.perf_counter())
        result = run.train_engine.step(run.state, tasks, torch.zeros((), device=run.device))
        marks.append(time.perf_counter())
        for leaf, gradient in zip(
            run.state.params.values(), result.gradients.values(), strict=True
        ):
            leaf.grad = gradient
        optimiser.step()
        marks.append(time.perf_counter())
        if number:
            spent["outside"] += marks[1] - marks[0] + marks[3] - marks[2]
            spent["model"] += marks[2] - marks[1]
    return spent["outside"] / (spent["outside"] + spent["model"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small batches, to try the script itself; writes nothing",
    )
    parser.add_argument(
        "--rest",
        action="store_true",
        help="all but the tasks a second, which stay as they were measured",
    )
    parser.add_argument("--memory", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print_peak_memory(arguments.memory[1:], arguments.memory[0])
        return
    device, rows = arguments.device, []
    file = _OUT / f"speed-{device}.json"
    environment_of_rows = describe_environment(device)
    if arguments.rest:
        kept = json.loads(file.read_text())
        rows, environment_of_rows = kept["rows"], kept["environment"]
    for name, words in [] if arguments.rest else cases(arguments.quick):
        run = made(words, device)
        found = rates(run, arguments.repeats)
        medians = {key: statistics.median(values) for key, values in found.items()}
        rows.append(
            {
                "case": name, "chosen": run.train_engine.strategy, "chunk": run.train_engine.chunk,
                "tasks_per_second": medians, "slowest": {key: min(values) for key, values in found.items()},
                "fastest": {key: max(values) for key, values in found.items()}, "speedup": medians["auto"] / medians["plain"],
            }
        )  # fmt: skip
        print(
            f"{name}: plain {medians['plain']:.1f}, auto ({run.train_engine.strategy}) {medians['auto']:.1f} tasks/s",
            flush=True,
        )
    maml = made(["algo=maml", "episode.train.query=5", "train.meta_batch=8"], device)
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
            {"inner_steps": steps, "meta_batch": batch, "rematerialise": again, "mib": peak_memory(
                ["algo=maml", f"algo.inner_steps={steps}", f"train.meta_batch={batch}", "episode.train.query=5",
                 f"engine.rematerialise={again}"], device)}
            for again in (False, True) for steps, batch in ((1, 8), (5, 8), (20, 8), (1, 32), (1, 128))
        ],
    }  # fmt: skip
    if not arguments.quick:
        _OUT.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=1) + "\n")
        (_OUT / f"speed-{device}.md").write_text(
            "\n".join(markdown(content, arguments.repeats)) + "\n"
        )


def markdown(content: dict[str, Any], repeats: int) -> list[str]:
    """The table people read."""
    where = content["environment"]
    lines = [
        "# Training speed",
        "",
        f"`make benchmark-speed`: tasks a second, median of {repeats} (slowest to fastest). Commit {where['commit']},",
        f"{where['hardware']}, torch {where['versions']['torch']}. Conv4-64; MAML's family with stride 2 and spatial mean.",
        "",
        "| case | plain loop | loop | vmap | mixed | auto picks | auto over plain | auto in bf16 | by libraries |",
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
            f"| {row['case']} | {' | '.join(cells)} | {row['chosen']}: {row['tasks_per_second']['auto']:.1f} | "
            f"{row['speedup']:.2f} | {row['tasks_per_second']['bf16']:.1f} | "
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
            if rest["commit"] != where["commit"]
            else []
        ),
        f"- {content['test_episodes']:,} test episodes of MAML, 5w1s, 15 queries: {content['test_seconds']:.1f} s",
        f"- from the command to the end of the first step, data in the cache: {content['first_step_seconds']:.1f} s",
        f"- share of a meta-step (MAML, 8 tasks, 5 queries) that is drawing tasks and the optimiser: "
        f"{content['share_outside_model']:.1%}",
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
