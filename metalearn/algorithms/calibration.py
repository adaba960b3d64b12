"""Distribution calibration: features sampled with the statistics of similar training classes."""

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.geometry import one_hot, squared_distance
from metalearn.algorithms.pt_map import power_transform
from metalearn.algorithms.solvers import logistic_regression
from metalearn.config.fields import above, at_least, between
from metalearn.tasks import prng
from metalearn.tasks.types import Params, Spec, State, Support

#: Added to the diagonal of a covariance, as a share of its mean, so that it has a factor.
_JITTER = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration(EmbeddingAlgorithm):
    """Logistic regression on features and on samples of a Gaussian around each (Yang et al. 2021).

    u = z^power (eq. 3). Gaussian of example i: mean (u_i + sum_c m_c) / (k + 1), covariance
    mean_c V_c + spread in every element, over the k training classes c whose mean m_c is nearest to
    u_i (eq. 5 and 6). As in the paper, m_c and V_c are of z, without the power.

    Departures: m_c and V_c are of training batches with weights that decay (theirs: of all training
    images, at the end); all examples share the samples' noise, so that their order does not matter.

    Theirs: power lambda 0.5, neighbours k 2, spread alpha 0.21, 750 samples per class, cost 1.
    """

    sources: ClassVar[tuple[str, ...]] = ("batches",)

    power: float = above(0)
    neighbours: int = at_least(1)
    spread: float = at_least(0)
    samples: int = at_least(1)
    cost: float = above(0)
    iterations: int = at_least(1)
    decay: float = between(0, 1)

    def init(self, spec: Spec, key: Tensor) -> State:
        """Create the parameters, and sums over the embeddings of each training class."""
        state = super().init(spec, key)
        classes, size = state.params["global.weight"].shape
        shapes = {"count": (classes,), "sum": (classes, size), "square": (classes, size, size)}
        own = {f"head.{n}": torch.zeros(shape, device=key.device) for n, shape in shapes.items()}
        return State(state.params, state.buffers | own)

    def observe(self, buffers: Params, z: Tensor, y: Tensor) -> Params:
        classes = len(buffers["head.count"])
        y = (y if y.is_floating_point() else one_hot(y, classes)).to(z.dtype)
        own = {"count": y.sum(0), "sum": y.T @ z, "square": torch.einsum("bc,bd,be->cde", y, z, z)}
        return {f"head.{n}": self.decay * buffers[f"head.{n}"] + x for n, x in own.items()}

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Tensor:
        u = power_transform(z.detach(), self.power)
        mean, factor = self.gaussians(weights, u)
        number = max(1, self.samples * support.way // len(u))
        noise = prng.normal(key, (number, u.shape[-1])).to(u.dtype)
        samples = mean.unsqueeze(1) + noise @ factor.mT
        x = torch.cat([u, samples.flatten(0, 1)])
        y = torch.cat([support.y, support.y.repeat_interleave(number)])
        # The solver is for features of norm at most 1.
        size = x.norm(dim=-1).amax()
        cost = self.cost * size.square()
        weight = logistic_regression(x / size, y, support.way, cost, self.iterations)
        return torch.cat([weight[:-1] / size, weight[-1:]])

    def gaussians(self, weights: Params, u: Tensor) -> tuple[Tensor, Tensor]:
        """Compute means [M, D], and factors [M, D, D] of covariances, for features [M, D]."""
        count = weights["head.count"].clamp_min(torch.finfo(u.dtype).tiny)
        means = weights["head.sum"] / count.unsqueeze(-1)
        unseen = weights["head.count"] == 0
        distance = squared_distance(u, means).masked_fill(unseen, torch.inf)
        nearest = distance.topk(min(self.neighbours, len(means)), -1, largest=False).indices
        m = means[nearest]
        square = weights["head.square"][nearest] / count[nearest][..., None, None]
        covariance = (square - m.unsqueeze(-1) * m.unsqueeze(-2)).mean(1) + self.spread
        jitter = _JITTER * covariance.diagonal(dim1=-2, dim2=-1).mean(-1) + _JITTER**2
        covariance = covariance + torch.diag_embed(jitter.unsqueeze(-1).expand_as(u))
        factor = torch.linalg.cholesky_ex(covariance)[0]
        return (u + m.sum(1)) / (m.shape[1] + 1), factor

    def compare(self, weights: Params, learned: Tensor, z: Tensor) -> Tensor:
        return F.pad(power_transform(z, self.power), (0, 1), value=1.0) @ learned
