"""Published results that `metalearn reproduce` compares with: the gates of conf/gates.yaml."""

import dataclasses
import functools
from typing import Any

from metalearn.config.components import conf_dir
from metalearn.system.reading import read_json

#: How far a mean accuracy may be below a published interval.
SLACK = 0.005


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """One published result, and the experiment that is compared with it.

    `mean` and `ci95` are of the published result (accuracies: fractions; no interval: 0), `episode`
    is None for the dataset's own, `settings` make the published test protocol.
    """

    name: str
    algo: str
    dataset: str
    episode: str | None
    mean: float
    ci95: float
    source: str
    paper: str
    departures: str
    metric: str = "accuracy"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def is_passed(self, mean: float) -> bool:
        """Return whether a mean over seeds passes; its own interval plays no part."""
        sign = -1 if self.metric == "mse" else 1
        slack = self.ci95 + (SLACK if self.metric == "accuracy" else 0)
        return sign * mean >= sign * self.mean - slack - 1e-12

    def node(self) -> dict[str, Any]:
        """Return the experiment as Hydra composes it, with 10,000 test episodes at full budgets."""
        defaults: list[Any] = [{f"override /{key}": one} for key, one in self.choices().items()]
        test = {"episodes": "${by:budget,{smoke:200,quick:1000,else:10000}}"}
        return {"defaults": [*defaults, "_self_"], "test": test, **self.settings}

    def choices(self) -> dict[str, str]:
        """Return the choices of groups, which with `settings` make the experiment."""
        chosen = {"algo": self.algo, "dataset": self.dataset}
        return chosen if self.episode is None else {**chosen, "episode": self.episode}


@functools.cache
def gates() -> dict[str, Gate]:
    """Return the gates by name, in the order of gates.yaml."""
    import yaml

    found = {}
    for group in yaml.safe_load((conf_dir() / "gates.yaml").read_text()):
        for episode, (mean, *ci95) in group.pop("published").items():
            own = None if episode == "default" else episode
            name = "_".join(filter(None, (group["algo"], group["dataset"], own)))
            score = {"mean": mean, "ci95": next(iter(ci95), 0.0)}
            found[name] = Gate(name=name, episode=own, **score, **group)
    return found


def measured(name: str, budget: str) -> dict[str, Any] | None:
    """Return the measured result of a gate that `scripts/results.py` stored, or None."""
    own: dict[str, Any] = read_json(conf_dir() / "measured.json").get(name, {})
    return own.get(budget)
