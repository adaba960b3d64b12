"""Heads that classify all queries of a task together, on embeddings of a trained backbone."""

import dataclasses
from typing import ClassVar

from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm, Examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransductiveHead(EmbeddingAlgorithm):
    """A head that is a function `compare` of the support examples and of all queries of a task.

    Its backbone is trained on batches, by a classifier over all training classes.
    """

    sources: ClassVar[tuple[str, ...]] = ("batches",)
    is_transductive: ClassVar[bool] = True
    is_iterative: ClassVar[bool] = True


def means_of(learned: Examples) -> Tensor:
    """Compute the class means [N, D] of the support set."""
    return learned.y.T @ learned.z / learned.y.sum(0).unsqueeze(-1)
