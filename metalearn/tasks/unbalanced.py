"""Query sets in which classes have random numbers of examples.

Veilleux, Boudiaf, Piantanida and Ben Ayed (2021), "Realistic evaluation of transductive few-shot
learning". Legend: T tasks, N classes, Q queries of a task, K examples of a class.
"""

import torch
from torch import Tensor

from metalearn.tasks import prng


def query_counts(key_T: Tensor, way: int, total: int, concentration: int) -> Tensor:
    """Draw the number of queries of each class, with a sum of `total`: int64 [T, N].

    Proportions have a Dirichlet distribution with the same parameter for each class, 1 or more; its
    numbers are sums of exponential ones, divided by their sum. Proportions times `total` are
    rounded down, and the classes with the largest remainders get one more.
    """
    gamma = -torch.log1p(-prng.uniform(key_T, (way, concentration)).double()).sum(-1)
    share = total * gamma / gamma.sum(-1, keepdim=True)
    counts = share.floor()
    missing = total - counts.sum(-1, keepdim=True)
    rank = (counts - share).argsort(-1).argsort(-1)
    return (counts + (rank < missing)).to(torch.int64)


def first_rows(rows_TNK: Tensor, counts_TN: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Take the first `counts` rows of each class: rows and labels, int64 [T, Q], Q = `total`."""
    ends = counts_TN.cumsum(-1)
    place = torch.arange(total, device=ends.device).expand(len(ends), -1).contiguous()
    y = torch.searchsorted(ends, place, right=True)
    place = place - (ends - counts_TN).gather(1, y)
    return rows_TNK.flatten(1).gather(1, y * rows_TNK.shape[-1] + place), y
