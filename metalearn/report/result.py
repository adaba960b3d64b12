"""A result: one measurement of one run, as result.json and evaluations/*.json hold it."""

import contextlib
import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from metalearn.report.stats import Difference
from metalearn.system.atomic import write_json
from metalearn.system.errors import UserError
from metalearn.system.reading import read_json
from metalearn.tasks.family import METRICS
from metalearn.tasks.types import Estimate


@dataclasses.dataclass(kw_only=True)
class Result:
    """One measurement of one run."""

    metric: str  # its name
    higher_is_better: bool
    test: Estimate  # over test episodes
    #: Worst episodes and classes, calibration, episodes needed for narrower intervals.
    details: dict[str, Any]
    #: What was measured. Results are comparable if and only if it is the same.
    protocol: dict[str, Any]
    protocol_id: str  # hash of `protocol`
    name: str  # algorithm and dataset
    seed: int  # of the training
    environment: dict[str, Any]  # commit, versions and hardware
    seconds: float  # wall-clock, of training and test or of an evaluation
    split: str = "test"  # whose classes were tested
    #: Facts of the training: command, val, best_step, steps, engine, processes.
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    #: Facts of a later evaluation: overrides, variant, dataset, and overlap if tested examples were
    #: trained on; of an ensemble, the folders of its runs.
    evaluation: dict[str, Any] = dataclasses.field(default_factory=dict)
    #: Paired difference on the same episodes, if both were tested.
    transductive_minus_inductive: Difference | None = None

    @property
    def hardware(self) -> str:
        """Return the hardware that computed the result."""
        return str(self.environment["hardware"])

    @property
    def validation_score(self) -> float:
        """Return the mean validation score of the best step."""
        return float(self.training["val"][self.metric]["mean"])

    @property
    def sign(self) -> int:
        """Return 1 if a higher value of the metric is better, else -1."""
        return 1 if self.higher_is_better else -1

    @property
    def shape(self) -> str:
        """Return way, shot and queries of test episodes, like 5w 1s 15q, and special settings."""
        way, shot = (
            "-".join(map(str, value)) if isinstance(value, list) else value
            for value in (self.protocol["way"], self.protocol["shot"])
        )
        special = ["unbalanced"] * bool(self.protocol.get("unbalanced"))
        special += [str(self.protocol[key]) for key in ("class_sampler",) if key in self.protocol]
        numbers = ("unlabelled", "distractors", "dirichlet")
        special += [f"{key}={self.protocol[key]:g}" for key in numbers if key in self.protocol]
        return " ".join([f"{way}w {shot}s {self.protocol['query']}q", *special])

    @property
    def statistics(self) -> str:
        """Return the statistics of normalisation, and whether the method itself is transductive."""
        statistics = str(self.protocol["statistics"])
        is_own = self.protocol.get("transductive") and statistics != "query"
        return f"{statistics}, transductive" if is_own else statistics

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the JSON file."""
        own = ("name", "split", "test", "higher_is_better", *_REQUIRED)
        content = {name: getattr(self, name) for name in own}
        content |= {"test": {self.metric: dataclasses.asdict(self.test)}}
        content |= self.training | self.evaluation
        if self.transductive_minus_inductive is not None:
            difference = dataclasses.asdict(self.transductive_minus_inductive)
            content["transductive_minus_inductive"] = difference
        return content

    def write(self, path: Path) -> None:
        """Write the JSON file atomically."""
        write_json(path, self.to_dict())

    @staticmethod
    def from_dict(content: dict[str, Any]) -> "Result":
        """Return the result in the content of a JSON file, also of an earlier version."""
        rest = dict(content)
        ((metric, estimate),) = rest.pop("test").items()
        better = {one.name: one.higher_is_better for one in METRICS.values()}.get(metric, True)
        difference = rest.pop("transductive_minus_inductive", None)
        own = {name: rest.pop(name) for name in _REQUIRED}
        other = {name: rest.pop(name) for name in list(rest) if name in _EVALUATION}
        return Result(
            metric=metric,
            higher_is_better=rest.pop("higher_is_better", better),
            test=Estimate(**estimate),
            split=rest.pop("split", "test"),
            training=rest,
            evaluation=other,
            transductive_minus_inductive=None if difference is None else Difference(**difference),
            **own,
        )

    @staticmethod
    def read(path: Path, is_own_test: bool = False) -> "Result":
        """Read a JSON file; the result of a run's own test must have a validation score.

        Raise UserError if the file does not exist or is not a result.
        """
        content = read_json(path, _TYPES)
        metric = next(iter(content["test"]), "")
        is_valid = not is_own_test or metric in content.get("val", {})
        if len(content["test"]) == 1 and re.fullmatch(r"\w+", metric) and is_valid:
            with contextlib.suppress(TypeError):  # an unknown field of an estimate
                return Result.from_dict(content)
        raise UserError(f"{path} does not hold the test, or validation, of one metric")


def hash_of(protocol: dict[str, Any]) -> str:
    """Return the identifier of a protocol; results with the same one can be compared."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:10]


_REQUIRED = ("name", "details", "protocol", "protocol_id", "seed", "environment", "seconds")
_EVALUATION = ("overrides", "variant", "dataset", "overlap", "ensemble")
_ESTIMATE = {"mean": float, "ci95": float, "episodes": int}
#: What the rest of the program relies on, as `check_types` takes it.
_TYPES = {
    "name": str, "seed": int, "seconds": float, "protocol_id": str, "split?": str, "dataset?": str,
    "overrides?": [str],
    "test": {"*": _ESTIMATE}, "val?": {"*": _ESTIMATE}, "higher_is_better?": bool,
    "protocol": {
        "way": (int, [int]), "shot": (int, [int]), "query": int, "statistics": str, "sampler?": int
    },
    "details": {
        "worst_decile?": {"mean": float}, "worst_classes?": {"*": float},
        "expected_calibration_error?": float, "episodes_needed?": {"*": int},
        "generalised?": {
            "base": _ESTIMATE, "novel": _ESTIMATE, "harmonic_mean": _ESTIMATE,
            "base_images_were_trained_on": bool,
        },
    },
    "environment": {"hardware": str},
    "transductive_minus_inductive?": {**_ESTIMATE, "p_value": float},
}  # fmt: skip
