"""`metalearn reproduce`: a recipe in `conf/experiment/`, trained, tested, and held against a figure: PASS or FAIL."""

import json
from pathlib import Path

from rich.console import Console

from metalearn import composition, config, report
from metalearn.config import checked
from metalearn.errors import UserError, nearest
from metalearn.figures import shown, shown_interval
from metalearn.verbs.train import RESULT_FILE

VERDICT_FILE = "reproduction.json"


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
            described = config.roles(config.plain(self._composed))
            if key.partition(".")[0].partition("/")[0] == "hydra" or config.may_reproduce_with(key, described):
                continue
            allowed = dict.fromkeys(
                name.partition(".")[0] for name in described if config.may_reproduce_with(name, described)
            )
            raise UserError(
                f"{word}: makes it another experiment; reproduce takes {', '.join(allowed)} and hydra; "
                f"use metalearn train experiment={self.name} {word}"
            )
        folder = f"outputs/reproduce/{self.name}-{self.budget}/${{now:%Y-%m-%d_%H-%M-%S-%f}}"
        own = [] if any(word.startswith("hydra.run.dir=") for word in more) else [f"hydra.run.dir={folder}"]
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
        if self.measured:
            lines.append(
                f"expected: {_shown(self.measured.mean, self.measured.ci95)} after "
                f"{self.measured.minutes:.1f} minutes on {self.measured.hardware}"
            )
        elif self.budget == "paper":
            lines.append("this budget has not been measured yet: it takes hours on a CPU")
        else:
            lines.append("this budget has no measured figure to hold against yet, so it cannot pass")
        return "\n".join(lines)

    def verdict(self, folder: Path, console: Console) -> bool:
        """Holds the result in `folder` against the figure: mean + ci95 >= figure - its ci95. Writes it down."""
        result = json.loads((folder / RESULT_FILE).read_text())
        found = next(iter(result["test"].values()))
        target = self._target()
        if target is None:
            passed, reason = False, f"no measured figure for budget={self.budget} to hold against"
        elif self.measured and self.budget != "paper" and result["protocol_id"] != self.measured.protocol_id:
            passed = False
            reason = f"protocol {result['protocol_id']} is not the {self.measured.protocol_id} of the measured figure"
        else:
            mean, ci95, where = target
            passed = found["mean"] + found["ci95"] >= mean - (ci95 or 0)
            reason = f"{_shown(found['mean'], found['ci95'])} against {_shown(mean, ci95)} ({where})"
        report.write_json(
            folder / VERDICT_FILE,
            {"experiment": self.name, "budget": self.budget, "passed": passed, "reason": reason},
        )
        report.print_line(console, f"{'PASS' if passed else 'FAIL'}: {reason}")
        return passed


def _shown(mean: float, ci95: float | None) -> str:
    return shown("accuracy", mean) if ci95 is None else shown_interval("accuracy", mean, ci95)
