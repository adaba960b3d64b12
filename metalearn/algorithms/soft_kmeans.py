"""Refined prototypes: soft k-means over labelled and unlabelled examples.

Ren, Triantafillou, Ravi, Snell, Swersky, Tenenbaum, Larochelle and Zemel (2018), "Meta-learning for
semi-supervised few-shot classification".
"""

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.geometry import class_means, class_sums, one_hot, squared_distance
from metalearn.algorithms.protonet import distance_scale
from metalearn.config.fields import above, at_least, choice
from metalearn.tasks import prng
from metalearn.tasks.types import Params, Spec, Support

#: Standard deviation of the initial weights of the network that predicts the mask.
_INIT_STD = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftKMeans(EmbeddingAlgorithm):
    """Prototypes of labelled examples, and of unlabelled ones with weights m_jn (Ren et al. 2018).

    c_n = (sum_i z_i y_in + sum_j z_j m_jn) / (sum_i y_in + sum_j m_jn), with d_jn = |z_j - c_n|^2:
      plain               m_j = softmax_n(-d_jn) (eq. 3)
      distractor_cluster  the same with one more cluster at the origin, whose radius r is learned:
                          its logit is -|z_j|^2 / r^2 - log r (eq. 4 and 5)
      masked              softmax_n(-d_jn) sigmoid(-g_n (d_jn / mean_j d_jn - b_n)) (eq. 6 to 9);
                          log b_n and log g_n come from a network, whose inputs are minimum,
                          maximum, variance, skewness and kurtosis of d_jn / mean_j d_jn over j

    As in the authors' code, no gradient flows through these statistics. Departure: their cluster
    at the origin is also a class of the queries, and then moves as the others do.

    Attributes:
        temperature: Divides squared distances. None: a quarter of the number of features.
        iterations: Number of refinements (theirs: 1).
        radius: Initial radius of the distractor cluster.
        hidden: Units of the hidden layer of the network (theirs: 20).
        mask_power: Power of the sigmoid: 1 in the paper, 2 in the authors' code.
    """

    uses_unlabelled: ClassVar[bool] = True

    variant: str = choice("plain", "distractor_cluster", "masked")
    temperature: float | None = above(0)
    iterations: int = at_least(0)
    radius: float = above(0)
    hidden: int = at_least(1)
    mask_power: int = at_least(1, default=1)

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        """Create the logarithm of the radius, or the network that predicts the mask."""
        if self.variant == "distractor_cluster":
            return {"head.log_radius": torch.full((), math.log(self.radius), device=key.device)}
        if self.variant == "plain":
            return {}
        params: Params = {}
        for layer, (outputs, inputs) in enumerate(((self.hidden, 5), (2, self.hidden))):
            weight = _INIT_STD * prng.normal(prng.fold_in(key, layer), (outputs, inputs))
            params[f"head.weight{layer}"] = weight
            params[f"head.bias{layer}"] = torch.zeros(outputs, device=key.device)
        return params

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Tensor:
        """Compute the refined prototypes [N, D]."""
        if support.unlabelled is None:
            return class_means(z, support.y, support.way)
        labelled, unlabelled = z.tensor_split([len(support.y)])
        means = class_means(labelled, support.y, support.way)
        total = class_sums(labelled, support.y, support.way)
        count = one_hot(support.y, support.way).sum(0).to(z.dtype)
        for _ in range(self.iterations):
            share_UN = self.shares(weights, unlabelled, means)
            means = (total + share_UN.T @ unlabelled) / (count + share_UN.sum(0)).unsqueeze(-1)
        return means

    def compare(self, weights: Params, learned: Tensor, z: Tensor) -> Tensor:
        return -squared_distance(z, learned) / (self.temperature or distance_scale(z))

    def shares(self, weights: Params, z_UD: Tensor, means_ND: Tensor) -> Tensor:
        """Compute the weight m [U, N] of each unlabelled example in the mean of each class."""
        logits_UN = self.compare(weights, means_ND, z_UD)
        if self.variant == "distractor_cluster":
            log_radius = weights["head.log_radius"]
            own = self.compare(weights, torch.zeros_like(means_ND[:1]), z_UD)
            own = own / (2 * log_radius).exp() - log_radius
            return torch.cat([logits_UN, own], -1).softmax(-1)[:, :-1]
        if self.variant == "plain":
            return logits_UN.softmax(-1)
        mean_N = -logits_UN.mean(0)
        distance_UN = -logits_UN / torch.where(mean_N > 0, mean_N, 1)  # 0: all are at the mean
        hidden = _statistics(distance_UN.detach()) @ weights["head.weight0"].T
        hidden = (hidden + weights["head.bias0"]).tanh()
        threshold, slope = (hidden @ weights["head.weight1"].T + weights["head.bias1"]).exp().T
        mask_UN = (slope * (threshold - distance_UN)).sigmoid()
        return logits_UN.softmax(-1) * mask_UN**self.mask_power


def _statistics(x_UN: Tensor) -> Tensor:
    """Compute minimum, maximum, variance, skewness and excess kurtosis over U: [N, 5]."""
    centred = x_UN - x_UN.mean(0)
    variance = centred.square().mean(0)
    std = torch.where(variance > 0, variance, 1).sqrt()
    skewness, kurtosis = ((centred / std).pow(power).mean(0) for power in (3, 4))
    return torch.stack([x_UN.amin(0), x_UN.amax(0), variance, skewness, kurtosis - 3], -1)
