"""Verification: whether two examples are of the same class, for classes new to the network.

Legend: M support examples, Q queries, D features, E episodes, P pairs.
"""

import dataclasses
from collections.abc import Iterator, Sequence
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

    def rows(self, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """Yield episode, names of both classes, whether they are the same, and score."""
        columns = (self.episode, self.query, self.support, self.same.long(), self.score)
        for number, query, support, same, score in zip(*map(Tensor.tolist, columns), strict=True):
            yield number, names[query], names[support], same, f"{score:.6g}"


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


def roc(
    score: Tensor, same: Tensor, episode: Tensor
) -> tuple[np.ndarray, tuple[float, ...], tuple[float, ...]]:
    """Compute the receiver operating characteristic of pairs.

    Args:
        score: Similarities [P].
        same: Whether a pair is of one class, bool [P].
        episode: Its episode, int64 [P].

    Returns:
        Shares of the pairs of two classes and of one class that are accepted at falling thresholds,
        [2, …]. The area under this curve, and its 95% interval by bootstrap over episodes. The same
        for the equal error rate, where as many pairs of one class are refused as of two accepted.
    """
    order = (-score.double()).argsort(stable=True)
    same_P, episode_P = same[order].numpy(), episode[order].numpy()
    ends = np.flatnonzero(np.diff(score[order].double().numpy(), append=-np.inf))  # of ties

    def rates(count_E: np.ndarray) -> np.ndarray:
        weight_P = count_E[episode_P]
        accepted = np.cumsum(weight_P * np.stack([~same_P, same_P]), 1)[:, ends]
        return np.pad(accepted / accepted[:, -1:], ((0, 0), (1, 0)))

    def numbers(curve: np.ndarray) -> tuple[float, float]:
        false, true = curve
        return sklearn.metrics.auc(false, true), float(np.interp(0, false + true - 1, false))

    episodes = int(episode.max()) + 1
    random = np.random.default_rng(_SEED)
    drawn = random.multinomial(episodes, [1 / episodes] * episodes, _RESAMPLES)
    intervals = np.quantile([numbers(rates(count_E)) for count_E in drawn], (0.025, 0.975), 0)
    curve = rates(np.ones(episodes))
    auc, eer = ((one, *own) for one, own in zip(numbers(curve), intervals.T.tolist(), strict=True))
    return curve, auc, eer
