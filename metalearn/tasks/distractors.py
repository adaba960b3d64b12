"""Episodes with distractors of no class: unlabelled inputs that none of the classes contains."""

import dataclasses

import torch
from torch import Tensor

from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.sampling import EpisodeSampler, numbered_keys
from metalearn.tasks.types import Task


@dataclasses.dataclass(frozen=True)
class DistractedSampler(EpisodeSampler):
    """Draw distractors from a pool of inputs, rows int64 [R], in the place of classes.

    A task has `shape.distractors` times `shape.unlabelled` of them, as many as if they were of
    classes. Its classes, support and query sets are those of the same task without distractors.
    Raise UserError as `EpisodeSampler` does; or if the pool is too small.
    """

    pool: Tensor = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        _ = self._plain
        if self._count > len(self.pool):
            where = self.shape.where
            raise UserError(
                f"distractors x unlabelled = {self._count}, but there are only {len(self.pool)} "
                f"distractors; lower {where}.distractors or {where}.unlabelled"
            )

    @property
    def _plain(self) -> EpisodeSampler:
        """The sampler of the same tasks without distractors."""
        shape = dataclasses.replace(self.shape, distractors=0)
        return EpisodeSampler(self.store, self.view, shape, self.key, self.support_store)

    @property
    def _count(self) -> int:
        return self.shape.distractors * self.shape.unlabelled

    def draw(self, first: int | Tensor, count: int) -> Task:
        task = self._plain.draw(first, count)
        key_T = prng.fold_in(numbered_keys(self.key, first, count), 7)
        rows = self.pool[prng.choice(prng.fold_in(key_T, 0), len(self.pool), self._count)]
        x = self.store.gather(rows, prng.fold_in(key_T, 1))
        assert task.support.unlabelled is not None
        x = torch.cat([task.support.unlabelled, x], 1)
        order = prng.permutation(prng.fold_in(key_T, 2), x.shape[1])
        x = x[torch.arange(count, device=x.device)[:, None], order]
        support = dataclasses.replace(task.support, unlabelled=x)
        return dataclasses.replace(task, support=support)

    def classes(self, first: int | Tensor, count: int) -> Tensor:
        return self._plain.classes(first, count)
