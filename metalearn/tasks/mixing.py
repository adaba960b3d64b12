"""Mix the examples of training batches and query sets in pairs (`augment.mix`).

To add a way of mixing, write a function here or in a plugin and add it to `MIXINGS`. It takes
inputs [B, *X], probabilities of the classes [B, N] and a key [], and returns inputs and
probabilities; settings and kinds of input are declared as for augmentations.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from metalearn.config.fields import between
from metalearn.tasks import prng
from metalearn.tasks.augment import inside, takes
from metalearn.tasks.sampling import TaskSource
from metalearn.tasks.types import Batch, Query, Task

#: (x [B, *X], y [B, N], key []) -> (x, y).
Mixing = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
#: Random stream of mixing, apart from those that methods derive from the same key.
_STREAM = 1 << 20


def beta(key: Tensor, count: int, alpha: float) -> Tensor:
    """Draw from the beta distribution with both parameters `alpha`, 0.05 to 1: float32 [count].

    The first of 32 pairs that Jöhnk's (1964) method accepts, each with a probability of at least
    1/2.
    """
    pair = (1 - prng.uniform(key, (2, count, 32)).double()).pow(1 / alpha)
    first = (pair.sum(0) <= 1).int().argmax(-1, keepdim=True)
    a, b = (part.gather(-1, first).squeeze(-1) for part in pair.unbind(0))
    return (a / (a + b)).float()


def mixed_labels(y: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """Return y [B, N] with a share [B] of its own labels and the rest from `other` [B]."""
    return torch.lerp(y[other], y, share[:, None])


@takes("images", "features")
def mixup(
    x: Tensor, y: Tensor, key: Tensor, alpha: Annotated[float, between(0.05, 1)] = 0.2
) -> tuple[Tensor, Tensor]:
    """Compute share * x + (1 - share) * other x, share ~ Beta(alpha, alpha) (Zhang et al. 2018).

    Each example has its own share (theirs: one per batch).
    """
    other = prng.permutation(prng.fold_in(key, 0), len(x))
    share = beta(prng.fold_in(key, 1), len(x), alpha)
    own = share.view(-1, *[1] * (x.dim() - 1))
    return torch.lerp(x[other], x, own), mixed_labels(y, other, share)


def cutmix(
    x: Tensor, y: Tensor, key: Tensor, probability: Annotated[float, between(0, 1)] = 0.5
) -> tuple[Tensor, Tensor]:
    """Paste a box of another image, whose share of the area is uniform (Yun et al. 2019).

    Each example has its own box (theirs: one per batch).
    """
    height, width = x.shape[-2:]
    other = prng.permutation(prng.fold_in(key, 0), len(x))
    chance, area, down, right = prng.uniform(prng.fold_in(key, 1), (4, len(x))).double().unbind(0)
    side = (area * (chance < probability)).sqrt()
    top, left = (down * height - side * height / 2), (right * width - side * width / 2)
    box = inside(x, top.round(), left.round(), (side * height).round(), (side * width).round())
    share = 1 - box.float().mean((1, 2, 3))
    return torch.where(box, x[other], x), mixed_labels(y, other, share)


MIXINGS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"mixup": mixup, "cutmix": cutmix}


def one_of(ops: Mapping[str, tuple[Callable[..., Any], Mapping[str, Any]]]) -> Mixing:
    """Return a mixing that draws one of (function, settings) for each batch or query set."""

    def mix(x: Tensor, y: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        chosen = prng.integers(prng.fold_in(key, len(ops)), (), len(ops))
        mixed_x, mixed_y = x, y
        for number, (function, settings) in enumerate(ops.values()):
            own_x, own_y = function(x, y, prng.fold_in(key, number), **settings)
            mixed_x = torch.where(chosen == number, own_x, mixed_x)
            mixed_y = torch.where(chosen == number, own_y, mixed_y)
        return mixed_x, mixed_y

    return mix


@dataclasses.dataclass(frozen=True)
class Mixed(TaskSource):
    """Training tasks or batches with mixed examples and with probabilities as their labels.

    `num_classes` is the number of classes N of all training, for batches.
    """

    source: Any
    mix: Mixing
    num_classes: int

    def classes(self, first: int | Tensor, count: int) -> Tensor | None:
        classes: Tensor | None = self.source.classes(first, count)
        return classes

    def draw(self, first: int | Tensor, count: int) -> Task | Batch:  # type: ignore[override]
        drawn: Task | Batch = self.source.draw(first, count)
        examples = drawn if isinstance(drawn, Batch) else drawn.query
        way = self.num_classes if isinstance(drawn, Batch) else drawn.support.way
        y = F.one_hot(examples.y, way).to(examples.x.dtype)
        x, y = vmap(self.mix)(examples.x, y, prng.fold_in(drawn.key, _STREAM))
        if isinstance(drawn, Batch):
            return dataclasses.replace(drawn, x=x, y=y)
        return dataclasses.replace(drawn, query=Query(x, y))
