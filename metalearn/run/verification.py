"""Verification: whether two examples are of the same class, for classes new to the network.

Legend: M support examples, Q queries, D features, E episodes, P pairs.
"""

import dataclasses
from typing import Any

import numpy as np
import sklearn.metrics
import torch
from torch import Tensor

from metalearn.algorithms.params import select
from metalearn.run.build import Run
from metalearn.tasks.types import State, Task

#: Resamples of the episodes for the intervals, and their seed.
_RESAMPLES, _SEED = 200, 0


def embedded(run: Run, state: State, task: Task) -> tuple[Tensor, Tensor]:
    """Embed a drawn episode by the meta-trained network: support [M, D], queries [Q, D]."""
    normalisation, net = run.algorithm.normalisation, select(state.params, "net")
    with torch.no_grad():
        support, reference = normalisation.embed_support(state, task.support.x[0])
        query, _ = normalisation.embed_queries(state, net, reference, task.query.x[0], None)
    return support, query


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of a query and a support example of the same test episode.

    Attributes:
        episode: Number of the episode, int64 [P].
        query: Class of the query by its index within the split, int64 [P].
        support: Class of the support example.
        score: Similarity, float32 [P]; see `Algorithm.similarity`.
    """

    episode: Tensor
    query: Tensor
    support: Tensor
    score: Tensor

    @property
    def same(self) -> Tensor:
        """Whether both examples are of one class, bool [P]."""
        return self.query == self.support


def draw_pairs(run: Run, state: State) -> Pairs:
    """Compare each query of the test episodes, of `episode_seed`, with each support example."""
    parts = []
    for number in range(run.config.test.episodes):
        at = torch.tensor([number])
        task, classes = run.test.draw(at, 1), run.test.classes(at, 1)
        assert classes is not None
        support, query = embedded(run, state, task)
        with torch.no_grad():
            score = run.algorithm.similarity(state.params | state.buffers, query, support)
        names = classes[0].to(score.device)
        own = (
            torch.full_like(score, number, dtype=torch.int64),
            names[task.query.y[0]][:, None].expand(score.shape),
            names[task.support.y[0]].expand(score.shape),
            score,
        )
        parts.append([one.flatten().cpu() for one in own])
    return Pairs(*map(torch.cat, zip(*parts, strict=True)))


@dataclasses.dataclass(frozen=True)
class Roc:
    """Receiver operating characteristic; intervals are 95% by bootstrap over episodes.

    Attributes:
        false_positive: Share of pairs of two classes that are accepted, at falling thresholds.
        true_positive: Share of pairs of one class that are accepted.
        auc: Area under the curve, and its interval.
        eer: Equal error rate, where as many pairs of one class are refused as of two are
            accepted, and its interval.
    """

    false_positive: list[float]
    true_positive: list[float]
    auc: tuple[float, float, float]
    eer: tuple[float, float, float]

    def facts(self) -> dict[str, Any]:
        """Return both numbers and their intervals as plain data."""
        names = {"auc": self.auc, "equal_error_rate": self.eer}
        return {
            name: {"value": value, "ci95": [low, high]}
            for name, (value, low, high) in names.items()
        }


def roc(score: Tensor, same: Tensor, episode: Tensor) -> Roc:
    """Compute the curve of scores [P] for `same`, bool [P], of pairs of episodes, int64 [P]."""
    order = (-score.double()).argsort(stable=True)
    same_P, episode_P = same[order].numpy(), episode[order].numpy()
    ends = np.flatnonzero(np.diff(score[order].double().numpy(), append=-np.inf))  # of ties

    def rates(count_E: Any) -> tuple[Any, Any]:
        weight_P = count_E[episode_P]
        counts = (np.cumsum(weight_P * one)[ends] for one in (~same_P, same_P))
        false, true = (np.concatenate([[0.0], one / one[-1]]) for one in counts)
        return false, true

    def numbers(false: Any, true: Any) -> tuple[float, float]:
        return sklearn.metrics.auc(false, true), float(np.interp(0, false + true - 1, false))

    episodes = int(episode.max()) + 1
    random = np.random.default_rng(_SEED)
    resampled = [
        numbers(*rates(random.multinomial(episodes, [1 / episodes] * episodes)))
        for _ in range(_RESAMPLES)
    ]
    false, true = rates(np.ones(episodes))
    auc, eer = (
        (value, *map(float, np.quantile(own, (0.025, 0.975))))
        for value, own in zip(numbers(false, true), zip(*resampled, strict=True), strict=True)
    )
    return Roc(false.tolist(), true.tolist(), auc, eer)
