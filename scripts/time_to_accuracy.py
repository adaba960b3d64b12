"""Minutes until MAML and ProtoNet reach a validation accuracy, by the engine and a plain loop.

python scripts/time_to_accuracy.py data_dir=<folder with omniglot> [minutes=60] [only=maml]
    [out=outputs/time-to-accuracy] [page=benchmarks] [small=true]

Both train the same network on the same tasks with the same optimiser, in turns, until each has
reached 95% and 97% on Omniglot (5-way 1-shot), or the minutes are over. Each has one thread, so
that the plain loop does not depend on how threads wait. The clock counts training alone, not
validation. State is saved after each turn: the same command continues, also after an interruption
(Ctrl-C ends with the turn). Writes time-to-accuracy.json and .md to `page` after each.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from pages import ROOT
from plain_loop import Step as PlainStep
from plain_loop import plain_step
from torch import Tensor

from metalearn.config import checking, composition
from metalearn.engine import Step
from metalearn.report.environment import describe_environment
from metalearn.run import checkpoint, scoring
from metalearn.run.build import Run, build
from metalearn.run.step import Training
from metalearn.system import signals

_GOALS = (0.95, 0.97)
#: Settings and number of steps between validations of each method.
_RECIPES: dict[str, tuple[int, list[str]]] = {
    "maml": (
        200,
        [
            "experiment=maml_omniglot_5w1s", "algo.inner_loss=mean", "backbone.downsample=stride",
            "backbone.output=mean", "train.meta_batch=8", "episode.train.query=5", "train.lr=0.002",
        ],
    ),
    "protonet": (100, ["experiment=protonet_omniglot_5w1s"]),
}  # fmt: skip
_SMALL = ["backbone.filters=4", "train.meta_batch=2", "episode.train.way=5"]


@dataclasses.dataclass(frozen=True)
class PlainEngine:
    """The plain loop in the place of an engine, so that the rest of training is the same."""

    compute: PlainStep

    def at(self, progress: float) -> "PlainEngine":
        """Return itself: it has no stages."""
        return self

    def step(self, state: Any, tasks: Any, progress: Tensor, *rest: Any) -> Step:
        """Compute meta-gradients and losses of tasks for the parameters of the run."""
        gradients, losses, statistics = self.compute(tasks)
        if not state.buffers:
            statistics = {}
        return Step(gradients, {"loss": losses.mean()}, statistics, {}, losses)


class Contestant:
    """One training, which continues from its files.

    Attributes:
        name: Method and side.
        rows: Step, minutes by the clock and of CPU time, and accuracy of each validation.
    """

    def __init__(self, method: str, side: str, out: Path, words: list[str], small: bool) -> None:
        self.name, self._state, self._table = (
            f"{method}, {side}",
            out / f"{method}-{side}.pt",
            out / f"{method}-{side}.json",
        )
        self._every, recipe = _RECIPES[method]
        words = [*recipe, "logger=none", "engine.threads=1", "val.episodes=400", *words]
        if small:
            self._every, words = 2, [*words, *_SMALL, "val.episodes=10"]
        self._run: Run = build(checking.check_config(composition.compose_config(words)))
        if side == "plain loop":
            engine: Any = PlainEngine(plain_step(self._run))
            self._run = dataclasses.replace(self._run, train_engine=engine)
        self._training = Training(self._run)
        self._training.note = lambda line: print(f"{self.name}: {line}", flush=True)
        self.rows: list[dict[str, float]] = []
        if self._table.exists():
            self.rows = json.loads(self._table.read_text())
            self._training.load_state_dict(checkpoint.load(self._state, self._run.device))

    def reached(self, goal: float) -> dict[str, float] | None:
        """Return the first validation with an accuracy of at least `goal`."""
        return next((row for row in self.rows if row["accuracy"] >= goal), None)

    @property
    def is_done(self) -> bool:
        """Return True if the last goal or step is reached."""
        last = self._run.config.train.steps
        return self.reached(_GOALS[-1]) is not None or self._training.step >= last

    def turn(self) -> None:
        """Train up to the next validation, validate and save."""
        training, run = self._training, self._run
        start, own = time.perf_counter(), time.process_time()
        for _ in range(min(self._every, run.config.train.steps - training.step)):
            training.load_tasks()
            training.meta_step()
            training.count()
        before = self.rows[-1] if self.rows else {"minutes": 0.0, "cpu_minutes": 0.0}
        minutes, cpu = (time.perf_counter() - start) / 60, (time.process_time() - own) / 60
        assert run.val is not None
        scores = scoring.evaluate(run, training.tested_state, run.val, run.config.val.episodes)
        self.rows.append(
            {
                "step": training.step,
                "minutes": before["minutes"] + minutes,
                "cpu_minutes": before["cpu_minutes"] + cpu,
                "accuracy": float(scores.mean()),
            }
        )
        checkpoint.save(self._state, training.state_dict())
        self._table.write_text(json.dumps(self.rows))
        row = self.rows[-1]
        print(f"{self.name}: step {row['step']}, {row['accuracy']:.1%}", flush=True)


def page(contestants: list[Contestant], environment: dict[str, Any]) -> list[str]:
    """Return the lines of the Markdown file."""
    lines = [
        "# Time to accuracy",
        "",
        f"`scripts/time_to_accuracy.py` at commit {environment['commit']}, "
        f"{environment['hardware']}, torch {environment['versions']['torch']}, seed 0.",
        "Minutes of training, without validation, until 400 validation episodes of Omniglot (5-way "
        "1-shot) reach an accuracy; in brackets minutes of CPU time. In turns on one thread.",
        "",
        f"| training | {' | '.join(f'{goal:.0%}' for goal in _GOALS)} | steps so far | best |",
        "|---" * (len(_GOALS) + 3) + "|",
    ]
    for one in contestants:
        cells = [
            f"{row['minutes']:.1f} ({row['cpu_minutes']:.1f}), step {row['step']}" if row else "-"
            for row in map(one.reached, _GOALS)
        ]
        last = f"{one.rows[-1]['step']}" if one.rows else "0"
        best = max((row["accuracy"] for row in one.rows), default=0.0)
        lines.append(f"| {one.name} | {' | '.join(cells)} | {last} | {best:.1%} |")
    return lines


def main() -> None:
    """Train in turns until all goals are reached or the time is over."""
    options = dict(arg.partition("=")[::2] for arg in sys.argv[1:])
    if "data_dir" not in options:
        sys.exit(__doc__)
    end = time.monotonic() + 60 * float(options.get("minutes", "60"))
    out, pages = (
        ROOT / options.get(name, default)
        for name, default in (("out", "outputs/time-to-accuracy"), ("page", "benchmarks"))
    )
    for folder in (out, pages):
        folder.mkdir(parents=True, exist_ok=True)
    words = [f"data_dir={options['data_dir']}", "device=" + options.get("device", "cpu")]
    contestants = [
        Contestant(method, side, out, words, "small" in options)
        for method in _RECIPES
        if options.get("only", "") in method
        for side in ("engine", "plain loop")
    ]
    environment = describe_environment(str(contestants[0]._run.device))
    with signals.deferred():
        while not all(one.is_done for one in contestants):
            for one in contestants:
                if not one.is_done:
                    one.turn()
                content = {
                    "environment": environment,
                    "rows": {each.name: each.rows for each in contestants},
                }
                file = pages / "time-to-accuracy.json"
                file.write_text(json.dumps(content, indent=1) + "\n")
                text = "\n".join(page(contestants, environment))
                file.with_suffix(".md").write_text(text + "\n")
                if signals.received_signal() is not None or time.monotonic() > end:
                    print("stopped; the same command continues", flush=True)
                    return


if __name__ == "__main__":
    main()
