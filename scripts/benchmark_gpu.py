"""Run everything that only a GPU can show, in one command of limited time.

python scripts/benchmark_gpu.py [seconds=540] [out=outputs/gpu] [device=cuda] [budget=paper]
    [episodes=10000] [small=false] [key=value …]

Parts, in this order, each in its own process:
- tests: the tests that require a GPU;
- speed: tasks per second of training and of the plain loop of scripts/benchmark_speed.py;
- jax: the same of a MAML gradient in JAX, if it is installed;
- maml_omniglot_5w1s: the recipe (60,000 steps with budget=paper);
- episodes: test episodes with its best weights so far;
- the other three recipes of MAML and the four of ProtoNet.

Each part has a share of the time; what it leaves is for the parts after it. A run that reaches its
limit is saved, and the same command continues it. A part with less than 15 seconds is skipped.
`out` receives results.json, rewritten after each part, the output of each part, and the run
folders. key=value are settings of the runs, like data_dir=…; small=true is for testing this script.
"""

import functools
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from benchmark_speed import cases
from plain_loop import build_run, plain_step
from speed_rivals import jax_gradient
from torch import Tensor

from metalearn.cli.reproduce import Recipe
from metalearn.engine import capture
from metalearn.report.environment import describe_environment
from metalearn.report.folder import RunFolder
from metalearn.run.step import Training
from metalearn.system.atomic import write_json
from metalearn.tasks.types import Task

_MAIN = "maml_omniglot_5w1s"
_OTHERS = [
    f"{method}_omniglot_{shape}"
    for shape in ("5w1s", "5w5s", "20w1s", "20w5s")
    for method in ("protonet", "maml")
    if f"{method}_omniglot_{shape}" != _MAIN
]
#: The share of the time after which each part ends; the recipes divide the rest evenly.
_ENDS = {"tests": 0.15, "speed": 0.32, "jax": 0.38, _MAIN: 0.66, "episodes": 0.74}
_NARROW = ["backbone.filters=8"]
#: In seconds: a part does not start with less; a recipe has at least; time to save a stopped run.
_LEAST, _USEFUL, _GRACE = 15.0, 40.0, 10.0


def speed(device: str, small: bool) -> Iterator[dict[str, Any]]:
    """Measure tasks per second of whole training steps, and of gradients by the plain loop."""
    for case, overrides in cases(quick=small):
        run = build_run([*overrides, *(_NARROW if small else [])], device)
        batch, notes = run.config.train.meta_batch, list[str]()
        training = Training(run)
        step = capture.Captured(
            training.meta_step,
            functools.partial(getattr, training, "engine"),
            run.device,
            run.reason_not_captured,
            notes.append,
        )

        def ten_steps(step: Any = step, training: Training = training) -> None:
            for _ in range(1 if small else 10):
                step()
                training.count()

        seconds = capture.fastest_seconds(ten_steps, run.device) / (1 if small else 10)
        plain, tasks = plain_step(run), run.train.draw(0, batch)
        loop = capture.fastest_seconds(functools.partial(plain, tasks), run.device)
        yield {
            "case": case,
            "tasks_per_second": {"training": batch / seconds, "plain loop": batch / loop},
            "speedup": loop / seconds,
            "engine": run.train_engine.choices,
            "notes": notes,
        }


def jax_speed(small: bool) -> Iterator[dict[str, Any]]:
    """Measure tasks per second of gradients in JAX, and their cosine with ours, on a CPU."""
    import jax

    for case, overrides in cases(quick=small):
        if not case.startswith("MAML"):
            continue
        # On a CPU, which leaves the GPU to JAX.
        run = build_run([*overrides, *(_NARROW if small else [])], "cpu")
        batch = run.config.train.meta_batch
        tasks = cast(Task, run.train.draw(0, batch))
        ours = run.train_engine.step(run.state, tasks, torch.zeros(())).gradients
        params = {name: jax.numpy.asarray(v.numpy()) for name, v in run.state.params.items()}
        parts = [
            tuple(jax.numpy.asarray(value.numpy()) for value in (part.x, part.y))
            for part in (tasks.support, tasks.query)
        ]
        gradient = jax_gradient(run.config.algo, run.config.backbone["eps"])
        seconds, theirs = [], {}
        for number in range(3 if small else 20):
            start = time.perf_counter()
            theirs = jax.block_until_ready(gradient(params, *parts))
            if number:  # the first call compiles
                seconds.append(time.perf_counter() - start)
        yield {
            "case": case,
            "tasks_per_second": batch / min(seconds),
            "median": batch / statistics.median(seconds),
            "cosine": _cosine([(ours[name], torch.tensor(theirs[name].tolist())) for name in ours]),
            "backend": jax.default_backend(),
            "version": jax.__version__,
        }


def _cosine(pairs: list[tuple[Tensor, Tensor]]) -> float:
    one, other = (torch.cat([pair[side].flatten().double() for pair in pairs]) for side in (0, 1))
    return float(one @ other / one.norm() / other.norm())


class Session:
    """Runs parts one after the other in the time that there is, and writes results.json."""

    def __init__(self, out: Path, seconds: float, about: dict[str, Any]) -> None:
        self._out, self._start, self._seconds = out, time.monotonic(), seconds
        self._content = {**about, "parts": dict[str, Any]()}
        out.mkdir(parents=True, exist_ok=True)

    def end_of_next(self, left: int) -> float:
        """Return where the next of some parts ends that divide the rest of the time evenly."""
        elapsed = time.monotonic() - self._start
        even = (self._seconds - elapsed) / left
        return min(1.0, (elapsed + max(_USEFUL, even)) / self._seconds)

    def part(
        self,
        name: str,
        end: float,
        command: list[str] | None,
        reason: str = "",
        run: RunFolder | None = None,
    ) -> None:
        """Run a command until it ends, or until the share `end` of the time is over.

        Args:
            name: Name of the part.
            end: Share of the time.
            command: The command; None to skip the part.
            reason: Why it is skipped.
            run: The folder of the run that the command trains.
        """
        limit = end * self._seconds - (time.monotonic() - self._start)
        if command is not None and limit < _LEAST:
            command, reason = None, f"only {max(0.0, limit):.0f} s were left for it"
        if command is None:
            self._store(name, {"outcome": "skipped", "reason": reason})
            return
        start, log = time.monotonic(), self._out / f"{name}.txt"
        with log.open("w") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
            try:
                process.wait(limit - _GRACE)
                outcome = "ended"
            except subprocess.TimeoutExpired:
                outcome = "stopped at its limit"
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(_GRACE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        lines = log.read_text().splitlines()
        content: dict[str, Any] = {
            "outcome": outcome,
            "exit_code": process.returncode,
            "seconds": round(time.monotonic() - start, 1),
            "last_line": next((line for line in reversed(lines) if line.strip()), ""),
            "results": [json.loads(line) for line in lines if line.startswith('{"')],
        }
        if run is not None and run.metrics.exists():
            rows = run.metrics.read_text().splitlines()
            content["results"] = [json.loads(line) for line in rows[-1:]]
        if run is not None and run.is_finished:
            content["test"] = vars(run.read_result().test)
        self._store(name, content)

    def recipe(self, name: str, end: float, budget: str, words: list[str]) -> Path:
        """Train and test a recipe as far as time allows; return the run folder."""
        files = RunFolder(self._out / "runs" / f"{name}-{budget}")
        command = [sys.executable, "-m", "metalearn", "reproduce", name, f"budget={budget}"]
        folder = [f"hydra.run.dir={files.path}", "resume=auto", "logger=none"]
        self.part(name, end, [*command, *folder, *words], run=files)
        return files.path

    def _store(self, name: str, content: dict[str, Any]) -> None:
        self._content["parts"][name] = content
        write_json(self._out / "results.json", self._content)
        shown = {key: value for key, value in content.items() if key != "results"}
        print(f"{name}: {json.dumps(shown)}", flush=True)


def main() -> None:
    """Run all parts, or, for a process of its own, one of the two measurements of speed."""
    given = dict(word.partition("=")[::2] for word in sys.argv[1:])
    seconds, out = float(given.pop("seconds", 540)), Path(given.pop("out", "outputs/gpu"))
    device, budget = given.pop("device", "cuda"), given.pop("budget", "paper")
    episodes, small = given.pop("episodes", "10000"), given.pop("small", "false") == "true"
    if "part" in given:
        for row in speed(device, small) if given["part"] == "speed" else jax_speed(small):
            print(json.dumps(row), flush=True)
        return
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("device=cuda: torch finds no CUDA device here; use device=cpu to test this script")
    own = [sys.executable, __file__, f"device={device}", f"small={str(small).lower()}"]
    words = [f"device={device}", *(f"{key}={value}" for key, value in given.items())]
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    environment = describe_environment(device)
    session = Session(out, seconds, {"command": sys.argv[1:], "environment": environment})
    pytest = ["-m", "pytest", "-n", "0", "-v", "-rs", "-k", "cuda", "-p", "no:cacheprovider"]
    files = (Path(__file__).parent.parent / "tests").glob("test_*.py")
    tests = [str(file) for file in files if "mark.cuda" in file.read_text()]  # others take long
    session.part("tests", _ENDS["tests"], [sys.executable, *pytest, *sorted(tests)])
    session.part("speed", _ENDS["speed"], [*own, "part=speed"])
    has_jax = importlib.util.find_spec("jax") is not None
    command = [*own, "part=jax"] if has_jax else None
    session.part("jax", _ENDS["jax"], command, "jax is not installed")
    folder = session.recipe(_MAIN, _ENDS[_MAIN], budget, words)
    test = [f"hydra.run.dir={out / 'episodes'}-{time.time_ns()}", "logger=none", *words]
    command = [sys.executable, "-m", "metalearn", "train", *Recipe(_MAIN, budget).overrides(test)]
    command += ["train.steps=0", f"train.start={folder}", "val.episodes=8"]
    command.append(f"test.episodes={episodes}")
    session.part(
        "episodes",
        _ENDS["episodes"],
        command if RunFolder(folder).best.exists() else None,
        "no validation has saved weights yet",
    )
    for number, name in enumerate(_OTHERS):
        session.recipe(name, session.end_of_next(len(_OTHERS) - number), budget, words)


if __name__ == "__main__":
    main()
