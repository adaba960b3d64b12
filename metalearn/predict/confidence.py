"""How far to trust labels: accuracy, calibration, conformal sets and doubtful examples.

Everything follows from cross-validation on the support set: each example is predicted by
classifiers that were trained without it. If the head was chosen by cross-validation, so it is in
each of these classifiers (nested cross-validation). Legend of shapes: M examples, N classes,
P predictions of held-out examples.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import betaincinv, log_softmax, softmax

#: Largest number of folds, and the number of trained classifiers that repetitions aim at.
_MAX_FOLDS, _FITS = 10, 20
#: With more examples than this, folds are not repeated and choices not nested: their part of the
#: error is small.
MANY = 500


class Outputs(NamedTuple):
    """Logits of queries [Q, N], and how unlike the classes each is [Q]."""

    logits: np.ndarray
    novelty: np.ndarray


#: (x [M, …], y [M], N, queries [Q, …]) -> outputs of a classifier that learned from x and y.
Procedure = Callable[[np.ndarray, np.ndarray, int, np.ndarray], Outputs]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Predictions of examples by classifiers that were trained without them."""

    rows: np.ndarray  # the example of each prediction, int64 [P]; `y` is its class
    y: np.ndarray
    logits: np.ndarray  # [P, N]; `novelty` is [P]
    novelty: np.ndarray
    folds: int  # number of folds; each classifier has learned from (folds - 1) / folds of a class
    repeats: int  # number of repetitions, with different folds

    @property
    def examples(self) -> int:
        """Return the number of examples that were held out."""
        return len(self.rows) // self.repeats


def hold_out(
    procedure: Procedure, x: np.ndarray, y: np.ndarray, way: int, fits: int = _FITS, seed: int = 0
) -> HeldOut | None:
    """Predict each example by classifiers that were trained without it.

    Folds are stratified: as far as possible, each fold has the same number of examples of each
    class. An example that is the only one of its class is in every training set. `fits` is the
    number of trained classifiers to aim at, by repetition. Return None if every class has one.
    """
    counts = np.bincount(y, minlength=way)
    folds = min(_MAX_FOLDS, int(counts.max()))
    if folds < 2:
        return None
    rng = np.random.default_rng(seed)
    repeats = 1 if len(y) > MANY else max(1, fits // folds)
    rows, outputs = [], []
    for _ in range(repeats):
        fold = np.full(len(y), -1)
        for one in np.flatnonzero(counts > 1):
            order = rng.permutation(np.flatnonzero(y == one))
            fold[order] = (rng.integers(folds) + np.arange(len(order))) % folds
        for number in range(folds):
            test = np.flatnonzero(fold == number)
            if len(test):
                train = fold != number
                rows.append(test)
                outputs.append(procedure(x[train], y[train], way, x[test]))
    index = np.concatenate(rows)
    return HeldOut(
        index, y[index], np.concatenate([one.logits for one in outputs]),
        np.concatenate([one.novelty for one in outputs]), folds, repeats,
    )  # fmt: skip


def temperature(logits: np.ndarray, y: np.ndarray, examples: int) -> float:
    """Find the temperature that minimises the cross-entropy of held-out predictions [P, N].

    Temperature scaling (Guo et al. 2017) with smoothed targets, as Platt's (1999): a share of
    0.5 / (M + 1) belongs to the other classes, so that the temperature of a faultless classifier
    is not 0. `examples` is the number M of different examples among the predictions.
    """
    way = logits.shape[1]
    share = 0.5 / (examples + 1)
    target = np.eye(way)[y] * (1 - share) + share * (1 - np.eye(way)[y]) / max(1, way - 1)

    def loss(log_temperature: float) -> float:
        scores = log_softmax(logits / math.exp(log_temperature), axis=1)
        return -float((target * scores).sum(1).mean())

    return math.exp(minimize_scalar(loss, bounds=(-6, 6), method="bounded").x)


def accuracy_interval(
    accuracy: float, examples: int, folds: int, queries: int | None = None
) -> tuple[float, float]:
    """Compute a 95% interval for the share of right labels among new images.

    Quantiles of the beta distribution with Jeffreys' prior (Brown, Cai and DasGupta 2001), with
    the variance of the share among `queries` images added (None: infinitely many). Held-out
    predictions come from classifiers with fewer examples of each class, by the factor
    (folds - 1) / folds; the upper end assumes that no more errors disappear, and no more right
    predictions are added, than by this factor. An end is 0 or 1 if every prediction is wrong or
    right. scripts/benchmark_trust.py measures the coverage.
    """
    factor = (folds - 1) / folds
    best = min(1 - (1 - accuracy) * factor, accuracy / factor)

    def end(share: float, quantile: float) -> float:
        a, b = share * examples + 0.5, (1 - share) * examples + 0.5
        mean = a / (a + b)
        spread = mean * (1 - mean)
        variance = spread / (a + b + 1) + (spread / queries if queries else 0)
        size = spread / variance - 1
        step = math.copysign(0.5 / queries, quantile - 0.5) if queries else 0
        return min(
            1.0, max(0.0, float(betaincinv(mean * size, (1 - mean) * size, quantile)) + step)
        )

    return (end(accuracy, 0.025) if accuracy > 0 else 0.0, end(best, 0.975) if best < 1 else 1.0)


def conformal_threshold(
    scores: np.ndarray, examples: int, error_rate: float, folds: int | None = None
) -> float | None:
    """Compute the score that a new example of a known class exceeds with probability `error_rate`.

    The quantile of split conformal prediction (Vovk et al. 2005), over held-out predictions as in
    cross-conformal prediction (Vovk 2015): scores [P], large for unusual ones, of M examples. The
    final classifier, which has learned from all examples, exceeds the threshold less often, by up
    to 1 / folds of the rate; half of that is assumed. `folds` is None for its own scores.

    Return None if M < 1 / error_rate - 1, too few to know it.
    """
    if examples < 1 / error_rate - 1 - 1e-9:
        return None
    if folds is not None:
        error_rate = min(1.0, error_rate * (1 + 0.5 / (folds - 1)))
    rank = (1 - error_rate) * (examples + 1) / examples * len(scores)
    return float(np.sort(scores)[max(0, math.ceil(rank - 1e-9) - 1)])


@dataclasses.dataclass(frozen=True)
class Label:
    """The label of an image or text: the two most probable classes.

    Attributes:
        unknown: True if it is unlike all classes; None if that cannot be known.
        plausible: The conformal set: classes that are not excluded at the error rate; None if there
            are too few examples for it.
    """

    label: Any
    probability: float
    second: Any
    second_probability: float
    unknown: bool | None
    plausible: list[Any] | None


@dataclasses.dataclass(frozen=True)
class Confidence:
    """What cross-validation on the support set says about new labels."""

    examples: int = 0  # number of examples that were held out; 0 if every class has one
    folds: int = 0  # number of folds
    accuracy: float | None = None  # share of right held-out predictions; None without any
    temperature: float = 1.0  # divides the logits
    error_rate: float = 0.1  # the rate that the thresholds are for
    #: Classes with a probability of at least 1 - `set_threshold` are in the set of plausible
    #: classes; None if there are too few examples.
    set_threshold: float | None = None
    #: Images with a larger novelty are unknown; None if too few.
    novelty_threshold: float | None = None
    #: Mean number of held-out examples by class (row) and prediction (column), [N, N].
    confusion: list[list[float]] = dataclasses.field(default_factory=list)
    #: (example, likely class, its probability) where the label looks wrong, worst first.
    doubtful: list[tuple[int, int, float]] = dataclasses.field(default_factory=list)

    def interval(self, queries: int | None = None) -> tuple[float, float] | None:
        """Return the 95% interval of the share of right labels; None if it cannot be known."""
        if self.accuracy is None:
            return None
        return accuracy_interval(self.accuracy, self.examples, self.folds, queries)

    def labels(self, outputs: Outputs, names: list[Any]) -> list[Label]:
        """Return the labels of queries, given the names of the N classes."""
        labels = []
        rows = softmax(outputs.logits, axis=1)
        for row, novelty in zip(rows, outputs.novelty, strict=True):
            order = np.argsort(-row, kind="stable").tolist()
            unknown = plausible = None
            if self.novelty_threshold is not None:
                unknown = bool(novelty > self.novelty_threshold)
            if self.set_threshold is not None:
                plausible = [names[one] for one in order if 1 - row[one] <= self.set_threshold]
            (label, one), (second, other) = ((names[n], float(row[n])) for n in order[:2])
            labels.append(Label(label, one, second, other, unknown, plausible))
        return labels


def assess(held_out: HeldOut | None, way: int, error_rate: float) -> Confidence:
    """Derive the confidence from held-out predictions of N classes."""
    if held_out is None:
        return Confidence(error_rate=error_rate)
    y, examples, folds = held_out.y, held_out.examples, held_out.folds
    degree = temperature(held_out.logits, y, examples)
    probabilities = softmax(held_out.logits / degree, axis=1)
    predicted = probabilities.argmax(1)
    confusion = np.zeros((way, way))
    np.add.at(confusion, (y, predicted), 1 / held_out.repeats)
    own = probabilities[np.arange(len(y)), y]
    return Confidence(
        examples=examples,
        folds=folds,
        accuracy=float((predicted == y).mean()),
        temperature=degree,
        error_rate=error_rate,
        set_threshold=conformal_threshold(1 - own, examples, error_rate, folds),
        novelty_threshold=conformal_threshold(held_out.novelty, examples, error_rate, folds),
        confusion=confusion.round(6).tolist(),
        doubtful=_doubtful(held_out, probabilities, way),
    )


def _doubtful(
    held_out: HeldOut, probabilities: np.ndarray, way: int
) -> list[tuple[int, int, float]]:
    """Find labels that look wrong: confident learning (Northcutt et al. 2021, eq. 1).

    An example is doubtful if another class is the most probable one, and more probable than it is
    on average for the examples of that class.
    """
    rows, position = np.unique(held_out.rows, return_inverse=True)
    mean = np.zeros((len(rows), way))
    np.add.at(mean, position, probabilities / held_out.repeats)
    y = np.zeros(len(rows), np.int64)
    y[position] = held_out.y
    counts = np.bincount(y, minlength=way)
    usual = np.array([mean[y == one, one].mean() if counts[one] else 1 for one in range(way)])
    likely = mean.argmax(1)
    top = mean.max(1)
    chosen = np.flatnonzero((likely != y) & (top >= usual[likely]))
    chosen = chosen[np.argsort(-top[chosen], kind="stable")]
    return [(int(rows[one]), int(likely[one]), float(top[one])) for one in chosen]
