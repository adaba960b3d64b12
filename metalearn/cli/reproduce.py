"""Train the recipe of a published result and compare: PASS or FAIL."""

from pathlib import Path
from typing import Any

from metalearn.cli import _arguments
from metalearn.system.errors import UserError, nearest

HELP = """metalearn reproduce <experiment> [budget=smoke|quick|day|paper] [seed=…] [key=value …]

Trains and tests the recipe of a published result, and ends with PASS or FAIL (exit code 0 or 1):
the same as metalearn train experiment=<experiment> budget=…, with a verdict. At budget=day (the
default, up to hours on two cores) and budget=paper (the authors' training) the target is the
published mean minus its interval, minus 0.5 points for accuracies. At smaller budgets the target is
the recipe's own measured result; a budget that was not measured with this version of the episode
sampler ends with NOT MEASURED (exit code 3).

experiments (metalearn list explains them)
  {reproductions}
"""
#: What shell completion offers.
TAKES: tuple[str, ...] = ("{experiment}", "budget=smoke|quick|day|paper", "{settings}")

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
    budget = _arguments.take(rest, "budget", "day")
    recipe = Recipe(names[0], str(budget))
    given = _arguments.parse_settings("reproduce", rest)
    arguments = _arguments.Arguments(recipe.overrides(given))
    from metalearn.cli import _launch
    from metalearn.report.console import open_console, print_line

    _launch.check(arguments)
    console = open_console()
    for line in recipe.announcement().splitlines():
        print_line(console, line)
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

    def verdict(self, folder: Path, console: Any) -> int:
        """Compare the result in `folder` with the target.

        At a full budget this is the gate's (`Gate.is_passed`); at a smaller one the upper end of
        the interval must reach the lower end of the measured result's.

        Write reproduction.json. Return 0 for PASS, 1 for FAIL, 3 if this budget has no target with
        this version of the sampler.
        """
        from metalearn.report.console import print_line
        from metalearn.report.folder import RunFolder
        from metalearn.system.atomic import write_json

        files = RunFolder(folder)
        result = files.read_result()
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
            "outcome": outcome, "reason": reason,
        }  # fmt: skip
        write_json(files.reproduction, verdict)
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
