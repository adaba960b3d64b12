"""`metalearn reproduce`: a recipe in `conf/experiment/`, trained, tested, and held against a figure: PASS or FAIL."""

import json
from pathlib import Path

from rich.console import Console

from metalearn.config import checking, composition, roles
from metalearn.config.checking import checked
from metalearn.report.console import print_line
from metalearn.report.tables import shown, shown_interval
from metalearn.run.train import RESULT_FILE
from metalearn.system.atomic import write_json
from metalearn.system.errors import UserError, nearest
from metalearn.tasks.sampling import SAMPLER_VERSION

VERDICT_FILE = "reproduction.json"
#: Exit code where there is nothing to hold a result against.
NOT_MEASURED = 3


def experiments() -> dict[str, str]:
    """Names of the experiments that stand for a published figure, with one line each."""
    return {
        name: line
        for name, line in composition.options("experiment").items()
        if "\nreproduction:" in (composition.conf_dir() / "experiment" / f"{name}.yaml").read_text()
    }


class Recipe:
    """One experiment at one budget. Raises: UserError where there is no such experiment or budget."""

    def __init__(self, name: str, budget: str) -> None:
        known = experiments()
        if name not in known:
            raise UserError(
                f"{name}: there is no such experiment to reproduce; there are {', '.join(known)}{nearest(name, known)}"
            )
        self._composed = checked(composition.composed([f"experiment={name}"]))
        settings = self._composed.reproduction
        assert settings is not None
        if budget not in settings.budgets:
            raise UserError(f"budget={budget}: should be one of {', '.join(settings.budgets)}")
        self.name, self.budget, self.settings = name, budget, settings
        self.measured = settings.measured.get(budget)

    def overrides(self, more: list[str]) -> list[str]:
        """What to train with. Raises: UserError where `more` would make it another experiment."""
        known = [*composition.groups(), *vars(self._composed), "hydra"]
        for word in more:
            key = word.split("=")[0]
            if key.partition(".")[0] not in known:
                raise UserError(f"{word}: there is no such key{nearest(key, known)}")
            described = roles.roles(checking.plain(self._composed))
            if key.partition(".")[0].partition("/")[0] == "hydra" or roles.may_reproduce_with(
                key, described
            ):
                continue
            allowed = roles.names_of(described, roles.may_reproduce_with)
            raise UserError(
                f"{word}: makes it another experiment; reproduce takes {', '.join(allowed)} and hydra; "
                f"use metalearn train experiment={self.name} {word}"
            )
        folder = f"outputs/reproduce/{self.name}-{self.budget}/${{now:%Y-%m-%d_%H-%M-%S-%f}}"
        own = (
            []
            if any(word.startswith("hydra.run.dir=") for word in more)
            else [f"hydra.run.dir={folder}"]
        )
        return [f"experiment={self.name}", *self.settings.budgets[self.budget], *own, *more]

    def _target(self) -> tuple[float, float | None, str] | None:
        """Mean, half-width (where there is one) and name of the figure to hold against."""
        if self.budget == "paper":
            published = self.settings.published
            return published.mean, published.ci95, f"published, {published.source}"
        if self.measured is None:
            return None
        return self.measured.mean, self.measured.ci95, f"measured for budget={self.budget}"

    def announcement(self) -> str:
        """What is about to be tried."""
        published = self.settings.published
        lines = [
            f"{self.name}, budget={self.budget}; published: {_shown(published.mean, published.ci95)} ({published.source})"
        ]
        if self._is_outdated:
            lines.append(
                f"budget={self.budget} was not measured with this sampler (version {SAMPLER_VERSION}): no verdict"
            )
        elif self.measured:
            lines.append(
                f"expected: {_shown(self.measured.mean, self.measured.ci95)} after "
                f"{self.measured.minutes:.1f} minutes on {self.measured.hardware}"
            )
        elif self.budget == "paper":
            lines.append("this budget has not been measured yet: it takes hours on a CPU")
        else:
            lines.append("this budget has not been measured yet: no verdict")
        return "\n".join(lines)

    def verdict(self, folder: Path, console: Console) -> int:
        """Hold the result in `folder` against the target: mean + ci95 >= target - its ci95; write it to reproduction.json.

        Returns:
            The exit code: 0 passed, 1 failed, 3 there is no result of this budget with this version of the sampler.
        """
        result = json.loads((folder / RESULT_FILE).read_text())
        found = next(iter(result["test"].values()))
        target, code = self._target(), 1
        if target is None or (self.budget != "paper" and self._is_outdated):
            code = NOT_MEASURED
            reason = f"budget={self.budget} was not measured with this sampler (version {SAMPLER_VERSION}); here {_shown(found['mean'], found['ci95'])}"
        elif (
            self.measured
            and self.budget != "paper"
            and result["protocol_id"] != self.measured.protocol_id
        ):
            reason = f"protocol {result['protocol_id']} is not the {self.measured.protocol_id} of the measured result"
        else:
            mean, ci95, where = target
            code = 0 if found["mean"] + found["ci95"] >= mean - (ci95 or 0) else 1
            reason = (
                f"{_shown(found['mean'], found['ci95'])} against {_shown(mean, ci95)} ({where})"
            )
        outcome = {0: "PASS", 1: "FAIL", NOT_MEASURED: "NOT MEASURED"}[code]
        write_json(
            folder / VERDICT_FILE,
            {
                "experiment": self.name,
                "budget": self.budget,
                "passed": code == 0,
                "outcome": outcome,
                "reason": reason,
            },
        )
        print_line(console, f"{outcome}: {reason}")
        return code

    @property
    def _is_outdated(self) -> bool:
        """Whether the measured result is of episodes of another version of the sampler."""
        return self.measured is not None and self.measured.sampler != SAMPLER_VERSION


def _shown(mean: float, ci95: float | None) -> str:
    return shown("accuracy", mean) if ci95 is None else shown_interval("accuracy", mean, ci95)
