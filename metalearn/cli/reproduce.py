"""Train the recipe of a published result and compare: PASS or FAIL."""

from pathlib import Path
from typing import Any

from metalearn.cli import _arguments
from metalearn.system.errors import UserError, nearest

HELP = """metalearn reproduce <experiment> [budget=smoke|quick|day|paper] [seed=…] [key=value …]
metalearn reproduce <experiment> run=<folder> [budget=…]

Trains and tests the recipe of a published result, and ends with PASS or FAIL (exit code 0 or 1):
the same as metalearn train experiment=<experiment> budget=…, with a verdict. At budget=day (the
default, up to hours on two cores) and budget=paper (the authors' training) the target is the
published mean minus its interval, minus 0.5 points for accuracies. At smaller budgets the target is
the recipe's own measured result; a budget that was not measured with this version of the episode
sampler ends with NOT MEASURED (exit code 3).

run=<folder> trains nothing: it tests a finished run of another experiment that was trained with the
same settings, with as many classes and examples as this one, and writes
reproduction-<experiment>.json there. Validation during training had those of the other one.

  metalearn reproduce protonet_omniglot_20w1s run=<folder of protonet_omniglot_5w1s>

experiments (metalearn list explains them)
  {reproductions}
"""
#: What shell completion offers.
TAKES: tuple[str, ...] = (
    "{experiment}",
    "budget=smoke|quick|day|paper",
    "run={folder}",
    "{settings}",
)

#: Exit code if there is no target to compare with.
NOT_MEASURED = 3


def main(args: list[str]) -> int:
    """Run the command. Return the exit code."""
    names = [word for word in args if "=" not in word]
    if len(names) != 1:
        raise UserError(
            "reproduce: takes the name of one experiment; see metalearn reproduce --help"
        )
    rest = [word for word in args if "=" in word]
    budget, run = _arguments.take(rest, "budget", "day"), _arguments.take(rest, "run")
    recipe = Recipe(names[0], str(budget))
    given = _arguments.parse_settings("reproduce", rest)
    arguments = _arguments.Arguments(recipe.overrides(given))
    from metalearn.cli import _launch
    from metalearn.report.console import open_console, print_line

    folder = None if run is None else Path(run).expanduser()
    if folder is None:
        _launch.check(arguments)
    else:
        recipe.changes(folder)
    console = open_console()
    for line in recipe.announcement().splitlines()[: 3 if folder is None else 2]:
        print_line(console, line)
    if folder is not None:
        return recipe.test(folder, given, console)
    return recipe.verdict(_launch.start(arguments)[0], console)


class Recipe:
    """One experiment at one budget; raises UserError if there is no such one."""

    def __init__(self, name: str, budget: str) -> None:
        from metalearn.config.checking import check_config
        from metalearn.config.composition import compose_config
        from metalearn.config.gates import gates, measured

        known = gates()
        if name not in known:
            raise UserError(
                f"{name}: there is no such experiment to reproduce; there are "
                f"{', '.join(known)}{nearest(name, known)}"
            )
        self._words = [f"experiment={name}", f"budget={budget}"]
        self._composed = check_config(compose_config(self._words))
        self.name, self.budget, self.gate = name, budget, known[name]
        self.measured = measured(name, budget)

    def overrides(self, more: list[str]) -> list[str]:
        """Return the overrides to train with; raise UserError if `more` changes the experiment."""
        from metalearn.config import checking, choices, roles

        groups = [*choices.groups(), *vars(self._composed), "hydra"]
        known = roles.roles(checking.plain(self._composed))
        for word in more:
            key = word.split("=")[0]
            group = key.partition(".")[0]
            if group not in groups:
                raise UserError(f"{word}: there is no such key{nearest(key, groups)}")
            if group.partition("/")[0] == "hydra" or roles.may_reproduce_with(key, known):
                continue
            allowed = roles.names_of(known, roles.may_reproduce_with)
            raise UserError(
                f"{word}: changes the experiment; reproduce takes {', '.join(allowed)} and hydra; "
                f"use metalearn train experiment={self.name} {word}"
            )
        folder = f"outputs/reproduce/{self.name}-{self.budget}/${{now:%Y-%m-%d_%H-%M-%S-%f}}"
        has_folder = any(word.startswith("hydra.run.dir=") for word in more)
        own = [] if has_folder else [f"hydra.run.dir={folder}"]
        return [*self._words, *own, *more]

    def announcement(self) -> str:
        """Return what to expect."""
        gate = self.gate
        result = self._shown(gate.mean, gate.ci95)
        line = (
            f"{self.name}, budget={self.budget}; published: {result} ({gate.source})\n"
            f"{gate.paper}. {gate.departures}\n"
        )
        if self._is_outdated:
            return f"{line}{self._not_measured()}: no verdict"
        if self.measured:
            expected = self._shown(self.measured["mean"], self.measured["ci95"])
            minutes = f"{self.measured['minutes']:.1f} minutes"
            return f"{line}expected: {expected} after {minutes} on {self.measured['hardware']}"
        if self._is_full:
            return f"{line}this budget has not been measured yet: it takes hours on a CPU"
        return f"{line}this budget has not been measured yet: no verdict"

    def _not_measured(self) -> str:
        from metalearn.tasks.sampling import SAMPLER_VERSION

        return (
            f"budget={self.budget} was not measured with this sampler (version {SAMPLER_VERSION})"
        )

    def changes(self, folder: Path) -> list[str]:
        """Return the settings of the test that differ from those of a finished run.

        Raise UserError if it is not finished, or if its training differs.
        """
        from metalearn.config import checking, composition, roles
        from metalearn.report.folder import RunFolder
        from metalearn.tasks.sampling import SAMPLER_VERSION

        files = RunFolder(folder)
        if not files.is_finished:
            raise files.unfinished()
        if files.read_result().protocol.get("sampler", 1) != SAMPLER_VERSION:
            raise UserError(f"run={folder}: was trained with an earlier version of the sampler")
        train = self._composed.train
        here = checking.plain(self._composed)
        there = checking.plain(checking.check_config(composition.load_config(folder)))
        known, own, other = roles.roles(here), checking.leaves(here), checking.leaves(there)
        # With patience, validation says how long training lasts.
        shape = () if train.patience else ("episode.way", "episode.shot", "episode.query")
        unused = ("episode.train.",) if train.source == "batches" else ()
        changes = []
        for key in dict.fromkeys(["budget", *own, *other]):
            is_same = own.get(key) == other.get(key) or key.startswith(unused)
            if is_same or roles.may_reproduce_with(key, known):
                continue
            if not key.startswith(("test.", *shape)):
                raise UserError(
                    f"run={folder}: was trained with {key}={other.get(key)}, {self.name} with "
                    f"{own.get(key)}"
                )
            changes.append(f"{key}={own[key]}")
        return sorted(changes)

    def test(self, folder: Path, more: list[str], console: Any) -> int:
        """Test a finished run with the same training; return as `verdict`."""
        from metalearn.report.folder import RunFolder
        from metalearn.report.result import Result
        from metalearn.run.evaluate import evaluate_several
        from metalearn.system.reading import read_json

        files, changes = RunFolder(folder), self.changes(folder)
        found = evaluate_several([folder], [], [*changes, *more], "test", console)
        test = Path(found["files"][0])
        is_gate = files.reproduction.exists()
        facts = {
            "run": read_json(files.reproduction)["experiment"] if is_gate else folder.name,
            "changes": changes,
            "test": str(test.relative_to(folder)),
        }
        return self._judge(Result.read(test), files.reproduction_of(self.name), console, facts)

    def verdict(self, folder: Path, console: Any) -> int:
        """Compare the result in `folder` with the target.

        At a full budget this is the gate's (`Gate.is_passed`); at a smaller one the upper end of
        the interval must reach the lower end of the measured result's.

        Write reproduction.json. Return 0 for PASS, 1 for FAIL, 3 if this budget has no target with
        this version of the sampler.
        """
        from metalearn.report.folder import RunFolder

        files = RunFolder(folder)
        return self._judge(files.read_result(), files.reproduction, console)

    def _judge(
        self, result: Any, file: Path, console: Any, facts: dict[str, Any] | None = None
    ) -> int:
        from metalearn.report.console import print_line
        from metalearn.system.atomic import write_json

        here, code = self._shown(result.test.mean, result.test.ci95), 1
        measured, gate = self.measured or {}, self.gate
        if self._is_full:
            code = 0 if gate.is_passed(result.test.mean) else 1
            target = self._shown(gate.mean, gate.ci95)
            reason = f"{here} against {target} (published, {gate.source})"
        elif not measured or self._is_outdated:
            code = NOT_MEASURED
            reason = f"{self._not_measured()}; here {here}"
        elif result.protocol_id != measured["protocol_id"]:
            reason = (
                f"protocol {result.protocol_id} is not the {measured['protocol_id']} of the "
                "measured result"
            )
        else:
            gap = result.sign * (measured["mean"] - result.test.mean)
            code = 0 if gap <= result.test.ci95 + measured["ci95"] + 1e-12 else 1
            target = self._shown(measured["mean"], measured["ci95"])
            reason = f"{here} against {target} (measured for budget={self.budget})"
        outcome = {0: "PASS", 1: "FAIL", NOT_MEASURED: "NOT MEASURED"}[code]
        verdict = {
            "experiment": self.name, "budget": self.budget, "passed": code == 0,
            "outcome": outcome, "reason": reason, **(facts or {}),
        }  # fmt: skip
        write_json(file, verdict)
        print_line(console, f"{outcome}: {reason}")
        return code

    @property
    def _is_outdated(self) -> bool:
        """True if the measured result is of another version of the sampler."""
        from metalearn.tasks.sampling import SAMPLER_VERSION

        return self.measured is not None and self.measured["sampler"] != SAMPLER_VERSION

    @property
    def _is_full(self) -> bool:
        """True if the published result is the target."""
        return self.budget in ("day", "paper")

    def _shown(self, mean: float, ci95: float) -> str:
        from metalearn.report.tables import format_interval, format_value

        metric = self.gate.metric
        return format_interval(metric, mean, ci95) if ci95 else format_value(metric, mean)
