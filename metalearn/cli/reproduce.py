"""Train the recipe of a published result and compare: PASS or FAIL."""

from pathlib import Path
from typing import Any

from metalearn.cli import _arguments
from metalearn.system.errors import UserError, nearest

HELP = """metalearn reproduce <experiment> [budget=smoke|quick|paper] [seed=…] [key=value …]

Trains and tests the recipe of a published result, and ends with PASS or FAIL (exit code 0 or 1).
At budget=paper (the default, hours on a CPU) the published result is the target, at smaller budgets
the recipe's own measured result. A budget that was not measured with this version of the episode
sampler ends with NOT MEASURED (exit code 3).

experiments (metalearn list explains them)
  {reproductions}
"""
#: What shell completion offers.
TAKES: tuple[str, ...] = ("{experiment}", "budget=smoke|quick|paper", "{settings}")

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
    budget = _arguments.take(rest, "budget", "paper")
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
        from metalearn.config.composition import compose_config, reproductions

        known = reproductions()
        if name not in known:
            raise UserError(
                f"{name}: there is no such experiment to reproduce; there are "
                f"{', '.join(known)}{nearest(name, known)}"
            )
        self._composed = check_config(compose_config([f"experiment={name}"]))
        settings = self._composed.reproduction
        assert settings is not None
        if budget not in settings.budgets:
            raise UserError(f"budget={budget}: should be one of {', '.join(settings.budgets)}")
        self.name, self.budget, self.settings = name, budget, settings
        self.measured = settings.measured.get(budget)

    def overrides(self, more: list[str]) -> list[str]:
        """Return the overrides to train with; raise UserError if `more` changes the experiment."""
        from metalearn.config import checking, composition, roles

        groups = [*composition.groups(), *vars(self._composed), "hydra"]
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
        return [f"experiment={self.name}", *self.settings.budgets[self.budget], *own, *more]

    def _target(self) -> tuple[float, float | None, str] | None:
        """Return mean, half-width (if there is one) and source of the target."""
        if self.budget == "paper":
            published = self.settings.published
            return published.mean, published.ci95, f"published, {published.source}"
        if self.measured is None:
            return None
        return self.measured.mean, self.measured.ci95, f"measured for budget={self.budget}"

    def announcement(self) -> str:
        """Return what to expect."""
        published = self.settings.published
        result = _shown(published.mean, published.ci95)
        line = f"{self.name}, budget={self.budget}; published: {result} ({published.source})\n"
        if self._is_outdated:
            return f"{line}{self._not_measured()}: no verdict"
        if self.measured:
            expected = _shown(self.measured.mean, self.measured.ci95)
            minutes = f"{self.measured.minutes:.1f} minutes"
            return f"{line}expected: {expected} after {minutes} on {self.measured.hardware}"
        if self.budget == "paper":
            return f"{line}this budget has not been measured yet: it takes hours on a CPU"
        return f"{line}this budget has not been measured yet: no verdict"

    def _not_measured(self) -> str:
        from metalearn.tasks.sampling import SAMPLER_VERSION

        return (
            f"budget={self.budget} was not measured with this sampler (version {SAMPLER_VERSION})"
        )

    def verdict(self, folder: Path, console: Any) -> int:
        """Compare the result in `folder` with the target: mean + ci95 >= target - its ci95.

        Write reproduction.json. Return 0 for PASS, 1 for FAIL, 3 if this budget has no target with
        this version of the sampler.
        """
        from metalearn.report.console import print_line
        from metalearn.report.folder import RunFolder
        from metalearn.system.atomic import write_json

        files = RunFolder(folder)
        result = files.read_result()
        here = _shown(result.test.mean, result.test.ci95)
        target, code = self._target(), 1
        is_paper = self.budget == "paper"
        if target is None or (not is_paper and self._is_outdated):
            code = NOT_MEASURED
            reason = f"{self._not_measured()}; here {here}"
        elif self.measured and not is_paper and result.protocol_id != self.measured.protocol_id:
            reason = (
                f"protocol {result.protocol_id} is not the {self.measured.protocol_id} of the "
                "measured result"
            )
        else:
            mean, ci95, source = target
            code = 0 if result.test.mean + result.test.ci95 >= mean - (ci95 or 0) else 1
            reason = f"{here} against {_shown(mean, ci95)} ({source})"
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

        return self.measured is not None and self.measured.sampler != SAMPLER_VERSION


def _shown(mean: float, ci95: float | None) -> str:
    from metalearn.report.tables import format_interval, format_value

    return (
        format_value("accuracy", mean) if ci95 is None else format_interval("accuracy", mean, ci95)
    )
