"""Measure methods on 2D navigation: the return after 0 to 3 inner steps (Finn et al. 2017, 5.3).

python scripts/benchmark_navigation.py [methods=maml:3,…] [key=value …]

Each method is followed by its number of seeds. Methods that are not given stay as they were
measured before; `methods=none` writes the pages and figures again.

Runs are in outputs/benchmark/navigation/<method>-seed<seed>/, one after the other with one thread;
a finished one with the same settings is skipped. Writes benchmarks/navigation.json and .md, the
tables of docs/navigation.md, and docs/figures/navigation_{steps,training,paths}.png.
"""

import json
import resource
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy
import torch
from pages import ROOT, fill
from runs import run
from torch import Tensor

from metalearn.algorithms.linear_head import LinearHeadAlgorithm
from metalearn.config import checking, composition
from metalearn.data.navigation import Plane
from metalearn.report import stats
from metalearn.report.folder import RunFolder
from metalearn.report.plots import new_figure
from metalearn.report.tables import format_interval, markdown_table
from metalearn.run.build import Run, build
from metalearn.run.measure import trained_state
from metalearn.run.request import Request
from metalearn.system.atomic import write_json, write_text
from metalearn.tasks.control import PolicyGradient
from metalearn.tasks.types import Query, State, Support

_RUNS = Path("outputs/benchmark/navigation")
_METHODS = "maml:3,cavia:2,fomaml:1,reptile:1"
_STEPS = (0, 1, 2, 3)
#: Finn et al. (2017), figure 4 and the text of section 5.3.
_PUBLISHED = (-40.41, -11.68, -3.33, -3.23)
#: Test tasks: those of every run's own test, also of the runs by which settings were chosen; and
#: fresh ones.
_TESTS = {
    "40 tasks": ["test.episodes=40"],
    "160 fresh tasks": ["test.episodes=160", "episode_seed=2026"],
}
_GOALS_DRAWN, _WALKS_DRAWN = 3, 8
#: Values of dataset.dice_lambda whose gradients are compared, and numbers of meta-batches.
_LAMBDAS, _REPEATS = (1.0, 0.9, 0.5, 0.0), 12


def trained(method: str, seed: int, more: list[str]) -> tuple[Path, dict[str, Any]]:
    """Train and test; return the folder, and the result with "cpu_seconds" of the command."""
    folder = _RUNS / f"{method}-seed{seed}"
    words = [f"algo={method}", "dataset=navigation", "engine.threads=1", f"seed={seed}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run(folder, words, more)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    file = folder / "cpu_seconds.json"
    if seconds > 1:  # otherwise the run was finished before
        write_json(file, seconds)
    return folder, result | {"cpu_seconds": json.loads(file.read_text())}


def opened(folder: Path, overrides: list[str]) -> tuple[Run, State]:
    """Return the run under another test protocol, and its trained state."""
    request = Request.of(folder, overrides, "test")
    test = request.run(request.statistics[0])
    return test, trained_state(test, folder)


def returns(folder: Path, overrides: list[str]) -> tuple[Tensor, Tensor]:
    """Return the return of each test task after each number of steps [steps, E], the oracle's [E].

    The oracle knows the goal and has no noise.
    """
    test, state = opened(folder, overrides)
    tasks = test.test.draw(0, test.config.test.episodes)
    scores = [test.test_engine.scores(state, tasks, steps) for steps in _STEPS]
    plane = Plane(test.config.dataset["horizon"])
    return torch.stack(scores), plane.best_return(tasks.query.y[:, 0])


def gradient_noise(folder: Path) -> list[dict[str, Any]]:
    """Compare the noise of the meta-gradient with its mean, by `dice_lambda`, for a trained state.

    The squared norm of the mean of R gradients is too large by their variance / R.
    """
    rows = []
    stored = json.loads(RunFolder(folder).result.read_text())["seed"]
    for dice_lambda in _LAMBDAS:
        words = ["algo=maml", "dataset=navigation", f"dataset.dice_lambda={dice_lambda}"]
        words += [f"seed={stored}", "engine.threads=1", "logger=none"]
        one = build(checking.check_config(composition.compose_config(words)))
        state, count = trained_state(one, folder), one.config.train.meta_batch
        gradients = torch.stack([
            torch.cat([value.flatten() for value in one.train_engine.step(
                state, one.train.draw(10**6 + number * count, count), torch.zeros(())
            ).gradients.values()])
            for number in range(_REPEATS)
        ])  # fmt: skip
        variance = gradients.var(0).sum()
        signal = (gradients.mean(0).square().sum() - variance / _REPEATS).clamp_min(0)
        rows.append({"dice_lambda": dice_lambda, "noise": float(variance.sqrt()),
                     "mean": float(signal.sqrt())})  # fmt: skip
    return rows


def draw_steps(measured: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot the return over inner steps on a logarithmic scale, with the published and the oracle's.

    Error bars are 95% intervals over the fresh tasks.
    """
    test = "160 fresh tasks"
    with new_figure(path) as figure:
        axes = figure.add_subplot()
        for number, (method, one) in enumerate(measured.items()):
            means, widths = zip(*one["tests"][test], strict=True)
            x = [steps + 0.04 * number for steps in _STEPS]
            axes.errorbar(x, means, widths, marker="o", markersize=4, capsize=3, label=method)
        axes.plot(_STEPS, _PUBLISHED, "k--s", markersize=4, linewidth=1, label="MAML, published")
        oracle = next(iter(measured.values()))["oracle"][test]
        axes.axhline(oracle, color="0.5", linestyle=":", label="oracle, knows the goal")
        axes.set_yscale("function", functions=(_log_of_loss, _loss_of_log))
        ticks = [-50, -30, -20, -10, -5, -3, -2, -1, -0.5]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set(xticks=_STEPS, ylim=(-60, -0.4), xlabel="inner steps",
                 ylabel="return (logarithmic scale), 95% interval")  # fmt: skip
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc=(0.02, 0.5))


def _log_of_loss(value: Any) -> Any:
    return -numpy.log(numpy.maximum(-value, 1e-6))


def _loss_of_log(value: Any) -> Any:
    return -numpy.exp(-value)


def draw_paths(folder: Path, path: Path) -> None:
    """Plot trajectories of some test tasks: one row per goal, one column per number of steps."""
    test, state = opened(folder, _TESTS["40 tasks"])
    algorithm, family = test.algorithm, test.family
    assert isinstance(algorithm, LinearHeadAlgorithm) and isinstance(family, PolicyGradient)
    tasks = test.test.draw(0, _GOALS_DRAWN)
    with new_figure(path, 2.4 * len(_STEPS), 2.4 * _GOALS_DRAWN + 0.3) as figure:
        panels = figure.subplots(_GOALS_DRAWN, len(_STEPS), sharex=True, sharey=True)
        for row in range(_GOALS_DRAWN):
            goal, key = tasks.query.y[row], tasks.key[row]
            support = Support(tasks.support.x[row], tasks.support.y[row], 1)
            query = Query(tasks.query.x[row], goal)
            for column, steps in enumerate(_STEPS):
                with torch.no_grad():
                    learner = algorithm.adapt(state, support, key=key, steps=steps)

                def net(params: Any, x: Tensor, learner: Any = learner) -> Any:
                    return algorithm.forward(state, learner._replace(params=params), x, None)

                rollouts = family.rollouts(net, learner.params, query, key)
                mean = family.metric.of(rollouts.rewards, goal)
                axes = panels[row][column]
                for walk in range(_WALKS_DRAWN):
                    alive = rollouts.alive[:, walk].bool()
                    axes.plot(*rollouts.states[alive, walk].T, color="C0", linewidth=0.7, alpha=0.6)
                axes.plot(0, 0, "ko", markersize=4, label="start")
                axes.plot(*goal[0], "r*", markersize=11, label="goal")
                axes.set(xlim=(-0.65, 0.65), ylim=(-0.65, 0.65), aspect="equal")
                axes.set_title(
                    f"{steps} step{'' if steps == 1 else 's'}, return {mean:.1f}", fontsize=9
                )
                axes.grid(alpha=0.3)
        panels[0][0].legend(fontsize=7, loc="upper left")


def draw_training(folders: dict[str, list[Path]], path: Path) -> None:
    """Plot the return of training tasks after the inner steps: mean and range over the seeds."""
    with new_figure(path) as figure:
        axes = figure.add_subplot()
        for method, own in folders.items():
            rows = [
                [row for line in RunFolder(one).metrics.read_text().splitlines()
                 if "train.return" in (row := json.loads(line))]
                for one in own
            ]  # fmt: skip
            steps = [row["step"] for row in rows[0]]
            values = [[row["train.return"] for row in each] for each in rows]
            columns = list(zip(*values, strict=True))
            (line,) = axes.plot(steps, [statistics.mean(one) for one in columns], label=method)
            axes.fill_between(steps, [min(one) for one in columns], [max(one) for one in columns],
                              color=line.get_color(), alpha=0.2)  # fmt: skip
        axes.set(xlabel="meta-training step", ylabel="return of training tasks after inner steps",
                 ylim=(-45, 0), title="mean and range of the seeds")  # fmt: skip
        axes.grid(alpha=0.3)
        axes.legend()


def table(measured: dict[str, dict[str, Any]], test: str) -> list[str]:
    """Return the Markdown table of a test: a row per method, a column per number of steps."""
    rows = []
    for method, one in measured.items():
        cells = one["tests"][test]
        rows.append(
            {"`algo=`": f"`{method}`"}
            | {
                f"{steps} step{'' if steps == 1 else 's'}": format_interval("return", *cells[steps])
                for steps in _STEPS
            }
            | {
                "oracle": f"{one['oracle'][test]:.2f}",
                "seeds": one["seeds"],
                "CPU seconds": f"{one['cpu_seconds']:.0f}",
                "wall seconds": f"{one['seconds']:.0f}",
                "commit": one["commit"],
            }
        )
    published = {f"{s} step{'' if s == 1 else 's'}": f"{_PUBLISHED[s]:.2f}" for s in _STEPS}
    blank = dict.fromkeys(("oracle", "seeds", "CPU seconds", "wall seconds", "commit"), "")
    return markdown_table([*rows, {"`algo=`": "MAML, published", **published, **blank}])


def main() -> None:
    """Run what is not finished; write the results, tables and figures."""
    torch.set_num_threads(1)
    given = dict(word.partition("=")[::2] for word in sys.argv[1:])
    words = [word.partition(":") for word in given.pop("methods", _METHODS).split(",")]
    methods = {name: range(int(count or 1)) for name, _, count in words if name != "none"}
    more = [f"{key}={value}" for key, value in given.items()]
    file = ROOT / "benchmarks/navigation.json"
    stored: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    measured: dict[str, dict[str, Any]] = stored.get("methods", {})
    noise, hardware = stored.get("gradient_noise", []), stored.get("hardware", "")
    for method, seeds in methods.items():
        runs = [trained(method, seed, more) for seed in seeds]
        environment = runs[0][1]["environment"]
        hardware = f"{environment['hardware']}, torch {environment['versions']['torch']}"
        one: dict[str, Any] = {
            "seeds": len(seeds), "tests": {}, "seed_means": {}, "oracle": {},
            "cpu_seconds": statistics.mean(result["cpu_seconds"] for _, result in runs),
            "seconds": statistics.mean(result["seconds"] for _, result in runs),
            "commit": environment["commit"],
        }  # fmt: skip
        for test, overrides in _TESTS.items():
            scores, oracles = zip(*(returns(folder, overrides) for folder, _ in runs), strict=True)
            by_seed = torch.stack(scores)
            # Seeds share the tasks; the interval is over tasks, of the mean over seeds.
            estimates = [stats.estimate(each) for each in by_seed.mean(0)]
            one["tests"][test] = [(each.mean, each.ci95) for each in estimates]
            one["seed_means"][test] = by_seed.mean(-1).tolist()
            one["oracle"][test] = float(oracles[0].mean())
        measured[method] = one
        print(json.dumps({method: one}), flush=True)
    if "maml" in methods:
        noise = gradient_noise(_RUNS / "maml-seed0")
    folders = {name: [_RUNS / f"{name}-seed{seed}" for seed in range(one["seeds"])]
               for name, one in measured.items()}  # fmt: skip
    command = "python scripts/benchmark_navigation.py"
    write_json(file,
               {"methods": measured, "gradient_noise": noise, "hardware": hardware})  # fmt: skip
    noise_rows = [
        {"`dice_lambda`": row["dice_lambda"], "noise": f"{row['noise']:.3f}",
         "mean": f"{row['mean']:.3f}"}
        for row in noise
    ]  # fmt: skip
    tables = [
        line
        for test in _TESTS
        for line in (f"{test[0].upper()}{test[1:]}:", "", *table(measured, test), "")
    ]
    tables += [f"{hardware}; `{command}`."]
    page = [
        "# 2D navigation", "",
        "Average return (higher is better) after 0 to 3 inner steps; mean over seeds, ± is the 95%",
        "interval over tasks. Seconds are of one run: training, validations and its test; wall",
        "seconds are at `nice -n 10`, beside other work on the same cores.", "",
        *tables, "", "By seed:", "",
    ]  # fmt: skip
    page += markdown_table([
        {"`algo=`": f"`{method}`", "test": test, "seed": seed,
         **{f"{steps}": f"{mean:.2f}" for steps, mean in zip(_STEPS, means, strict=True)}}
        for method, one in measured.items()
        for test in _TESTS
        for seed, means in enumerate(one["seed_means"][test])
    ])  # fmt: skip
    write_text(ROOT / "benchmarks/navigation.md", "\n".join([*page, ""]))
    docs = ROOT / "docs/navigation.md"
    fill(docs, "navigation: written by scripts/benchmark_navigation.py", tables)
    if noise:
        fill(docs, "noise: written by scripts/benchmark_navigation.py", markdown_table(noise_rows))
    figures = ROOT / "docs/figures"
    draw_steps(measured, figures / "navigation_steps.png")
    draw_training(folders, figures / "navigation_training.png")
    draw_paths(next(iter(folders.values()))[0], figures / "navigation_paths.png")


if __name__ == "__main__":
    main()
