"""Published results that `metalearn reproduce` compares with: the gates of conf/gates.yaml."""

import dataclasses
import functools
from typing import Any

from metalearn.config.components import conf_dir
from metalearn.system.reading import check_types, read_json

#: Test episodes of a gate, at each budget.
_EPISODES = "${by:budget,{smoke:200,quick:1000,else:10000}}"
#: How far a mean accuracy may be below a published interval.
SLACK = 0.005

_INTERVAL = [float]
#: A group of gates in gates.yaml, as `check_types` takes it.
_GROUP = {
    "algo": str, "dataset": str, "paper": str, "source": str, "departures": str, "metric?": str,
    "published": {"*": _INTERVAL}, "settings?": {},
}  # fmt: skip

_MEASURED = {
    "mean": float, "ci95": float, "minutes": float, "hardware": str, "protocol_id": str,
    "sampler": int, "seed": int,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """One published result, and the experiment that is compared with it.

    Attributes:
        name: Name of the experiment, `<algo>_<dataset>_<episode>`.
        algo: The method.
        dataset: The dataset.
        episode: Choice of the group episode; None for the dataset's own.
        metric: Name of the metric.
        mean: Published mean; of accuracy, a fraction.
        ci95: Half-width of the published 95% interval; 0 if none was published.
        source: Where the result was read.
        paper: Publication of the method.
        departures: How the protocol differs from the publication's.
        settings: Settings of the published test protocol; training is the recipe's.
    """

    name: str
    algo: str
    dataset: str
    episode: str | None
    metric: str
    mean: float
    ci95: float
    source: str
    paper: str
    departures: str
    settings: dict[str, Any]

    def is_passed(self, mean: float) -> bool:
        """Return whether a mean over seeds passes.

        It is at least the published mean minus its interval, and for accuracies minus `SLACK`. The
        interval of the measured mean plays no part.
        """
        sign = -1 if self.metric == "mse" else 1
        slack = self.ci95 + (SLACK if self.metric == "accuracy" else 0)
        return sign * mean >= sign * self.mean - slack - 1e-12

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
        check_types(group, _GROUP)
        rest = {key: value for key, value in group.items() if key != "published"}
        for episode, (mean, *ci95) in group["published"].items():
            own = None if episode == "default" else episode
            name = "_".join(filter(None, (group["algo"], group["dataset"], own)))
            found[name] = Gate(
                **{"metric": "accuracy", "settings": {}, **rest},
                name=name, episode=own, mean=mean, ci95=next(iter(ci95), 0.0),
            )  # fmt: skip
    return found


def measured(name: str, budget: str) -> dict[str, Any] | None:
    """Return the measured result of a gate at a budget, or None if it was not measured.

    `scripts/results.py` writes them to conf/measured.json, with the `sampler`'s version.
    """
    own = read_json(conf_dir() / "measured.json").get(name, {}).get(budget)
    if own is not None:
        check_types(own, _MEASURED)
    return own


@functools.cache
def register() -> None:
    """Make each gate a choice of Hydra's group experiment."""
    from hydra.core.config_store import ConfigStore

    for gate in gates().values():
        defaults: list[Any] = [{f"override /{key}": one} for key, one in gate.choices().items()]
        test = {"test": {"episodes": _EPISODES}}
        node = {"defaults": [*defaults, "_self_"], **test, **gate.settings}
        ConfigStore.instance().store(gate.name, node, group="experiment", package="_global_")
