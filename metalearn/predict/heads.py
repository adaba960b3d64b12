"""Heads: classifiers over the features of a few labelled examples.

A head's logits are a temperature away from log-probabilities; `confidence.py` finds it. Legend of
shapes: M examples, N classes, Q queries, D features.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metalearn.algorithms.geometry import class_means, cosine, squared_distance

#: Names of the heads. `auto` prefers the first: the best of them on four datasets
#: (benchmarks/own_examples.md).
HEADS = ("ridge", "logistic", "prototype", "cosine", "nearest")
#: Temperature of cosines and of halved squared distances between features of norm 1.
_TEMPERATURE = 0.1

Arrays = dict[str, np.ndarray]


def scaling(x: np.ndarray, normalise: str) -> Arrays:
    """Learn from features [M, D] how to scale features to a norm of 1.

    "l2": each vector by its own norm; "standard": each feature by its mean and standard deviation
    over the examples, and by the square root of D.
    """
    if normalise == "l2":
        return {}
    std = x.std(0)
    return {"shift": x.mean(0), "scale": np.where(std > 0, std, 1) * x.shape[1] ** 0.5}


def scaled(learned: Mapping[str, Any], x: Any) -> Any:
    """Scale features [M, D], an array or a tensor, as `scaling` has learned; 0 stays 0."""
    if "shift" in learned:
        return (x - learned["shift"]) / learned["scale"]
    norm = (x**2).sum(1)[:, None] ** 0.5
    return x / (norm + (norm == 0))


def learn(
    head: str, normalise: str, x: np.ndarray, y: np.ndarray, way: int, cost: float = 1.0
) -> Arrays:
    """Learn a head from x, float64 [M, D], and y, int64 [M]; each of N >= 2 classes occurs.

    Classes have equal weight, whatever their numbers of examples. `cost` is `C` of the logistic
    regression, and the inverse of the penalty of the ridge.

    Returns:
        What `logits` requires: "means" [N, D] and, for some heads, "weight" [N, D] and "bias" [N],
        or "points" [M, D] and "classes" [M].
    """
    learned = scaling(x, normalise)
    z = scaled(learned, x)
    means = class_means(torch.from_numpy(z), torch.from_numpy(y), way).numpy()
    learned["means"] = means
    balance = len(y) / (way * np.bincount(y, minlength=way)[y])
    if head == "nearest":
        learned |= {"points": z, "classes": y}
    elif head == "logistic":
        from sklearn.linear_model import LogisticRegression

        fit: Any = LogisticRegression(C=cost, tol=1e-8, max_iter=10_000).fit(z, y, balance)
        weight, bias = fit.coef_, fit.intercept_
        if way == 2:  # scikit-learn has one logit for two classes
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        learned |= {"weight": weight, "bias": bias}
    elif head == "ridge":
        from sklearn.linear_model import Ridge

        fit = Ridge(alpha=1 / cost).fit(z, np.eye(way)[y], balance)
        learned |= {"weight": fit.coef_ / _TEMPERATURE, "bias": fit.intercept_ / _TEMPERATURE}
    return learned


def logits(head: str, learned: Arrays, x: np.ndarray) -> np.ndarray:
    """Compute the logits [Q, N] of queries [Q, D]."""
    tensors = {name: torch.from_numpy(value) for name, value in learned.items()}
    result: np.ndarray = tensor_logits(head, tensors, torch.from_numpy(x)).numpy()
    return result


def tensor_logits(head: str, learned: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute the logits [Q, N] of queries [Q, D]; all tensors have one type."""
    z, means = scaled(learned, x), learned["means"]
    if head in ("logistic", "ridge"):
        return z @ learned["weight"].T + learned["bias"]
    if head == "cosine":
        return cosine(z, means) / _TEMPERATURE
    if head == "prototype":
        return -squared_distance(z, means) / (2 * _TEMPERATURE)
    distances = squared_distance(z, learned["points"])
    nearest = [distances[:, learned["classes"] == one].amin(1) for one in range(len(means))]
    return -torch.stack(nearest, 1) / (2 * _TEMPERATURE)


def novelty(learned: Arrays, x: np.ndarray) -> np.ndarray:
    """Compute the squared distance of queries [Q, D] to the nearest class mean: [Q]."""
    z = torch.from_numpy(scaled(learned, x))
    distances: np.ndarray = squared_distance(z, torch.from_numpy(learned["means"])).numpy()
    return distances.min(1)
