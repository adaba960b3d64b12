"""Heads: classifiers over the features of a few labelled examples.

A head's logits are a temperature away from log-probabilities; `confidence.py` finds it. Legend of
shapes: M examples, N classes, Q queries, D features.
"""

from typing import Any

import numpy as np
import torch

from metalearn.algorithms.geometry import class_means, cosine, squared_distance

#: Names of the heads. `auto` takes the first of those that are equally good.
HEADS = ("ridge", "logistic", "prototype", "cosine", "nearest")
#: Temperature of cosines and of halved squared distances between features of norm 1.
_TEMPERATURE = 0.1

Arrays = dict[str, np.ndarray]


def scaling(x: np.ndarray, normalise: str) -> Arrays:
    """Learn from features [M, D] how to scale features to a norm of 1.

    Args:
        x: Features of the examples [M, D].
        normalise: "l2": each vector by its own norm; "standard": each feature by its mean and
            standard deviation over the examples, and by the square root of D.
    """
    if normalise == "l2":
        return {}
    std = x.std(0)
    return {"shift": x.mean(0), "scale": np.where(std > 0, std, 1) * x.shape[1] ** 0.5}


def scaled(learned: Arrays, x: np.ndarray) -> np.ndarray:
    """Scale features [M, D] as `scaling` has learned; a vector of zeros stays so."""
    if "shift" in learned:
        result: np.ndarray = (x - learned["shift"]) / learned["scale"]
        return result
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norm > 0, norm, 1)


def learn(
    head: str, normalise: str, x: np.ndarray, y: np.ndarray, way: int, cost: float = 1.0
) -> Arrays:
    """Learn a head. Classes have equal weight, whatever their numbers of examples.

    Args:
        head: One of `HEADS`.
        normalise: See `scaling`.
        x: Features, float64 [M, D].
        y: Classes, int64 [M]; each of the N classes occurs.
        way: N, at least 2.
        cost: `C` of the logistic regression, and the inverse of the penalty of the ridge.

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
    z = scaled(learned, x)
    if head in ("logistic", "ridge"):
        result: np.ndarray = z @ learned["weight"].T + learned["bias"]
        return result
    queries, means = torch.from_numpy(z), torch.from_numpy(learned["means"])
    if head == "cosine":
        return (cosine(queries, means) / _TEMPERATURE).numpy()
    if head == "prototype":
        return (-squared_distance(queries, means) / (2 * _TEMPERATURE)).numpy()
    distances = squared_distance(queries, torch.from_numpy(learned["points"])).numpy()
    nearest = [distances[:, learned["classes"] == one].min(1) for one in range(len(means))]
    return -np.stack(nearest, 1) / (2 * _TEMPERATURE)


def novelty(learned: Arrays, x: np.ndarray) -> np.ndarray:
    """Compute the squared distance of queries [Q, D] to the nearest class mean: [Q]."""
    z = torch.from_numpy(scaled(learned, x))
    distances: np.ndarray = squared_distance(z, torch.from_numpy(learned["means"])).numpy()
    return distances.min(1)
