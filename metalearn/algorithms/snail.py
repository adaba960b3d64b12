"""SNAIL: temporal convolutions and causal attention read the support set, then a query.

Mishra, Rohaninejad, Chen and Abbeel (2018), "A simple neural attentive meta-learner".
"""

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm, Examples
from metalearn.algorithms.geometry import one_hot
from metalearn.config.fields import at_least
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.types import Params, Spec, Support


@dataclasses.dataclass(frozen=True, kw_only=True)
class SNAIL(EmbeddingAlgorithm):
    """logits = last output of a sequence: (z_i, y_i) in random order, then (z(x), 0).

    Each block appends features to its input h_t (Mishra et al. 2018, 3.1):
      dense      tanh(a) sigmoid(b), with [a, b] = V [h_(t-r), h_t] + v: a causal convolution of
                 size 2 with dilation r; zeros are before the sequence
      TC         dense blocks with r = 1, 2, 4, …
      attention  softmax over s <= t of (q_t k_s / sqrt(K)) times the values v_s; q, k and v are
                 affine in h
    The network is attention, TC, attention, TC, attention, and an affine output. No block sees
    later steps, so all queries of a task share the computation of its support set.

    Departures: r starts at 1 (their pseudocode: 2, with which a step never reaches those at odd
    distances); their rates of dropout and the like are unknown, so there are none.

    Attributes:
        filters: Number of features that a dense block appends.
        dense_blocks: Number of dense blocks of a TC block (theirs: log2(M + 1), rounded up).
        keys: Size K of the keys of each attention block; TC blocks are between them.
        values: Number of features that each attention block appends.
    """

    fixed_way: ClassVar[bool] = True
    class_equivariant: ClassVar[bool] = False
    support_order_matters: ClassVar[bool] = True

    filters: int = at_least(1)
    dense_blocks: int = at_least(1)
    keys: list[int] = at_least(1)
    values: list[int] = at_least(1)

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        """Create the affine maps of all blocks, with variance 1 / inputs."""
        if len(self.keys) != len(self.values):
            raise UserError(
                f"algo.values={self.values}: should have one number for each of "
                f"algo.keys={self.keys}"
            )
        params: Params = {}
        width = size + spec.way

        def affine(name: str, rows: int, columns: int) -> None:
            weight = prng.normal(prng.fold_in(key, len(params)), (rows, columns))
            params[f"{name}.weight"] = weight * columns**-0.5
            params[f"{name}.bias"] = torch.zeros(rows, device=key.device)

        for block, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            for number in range(self.dense_blocks if block else 0):
                affine(f"head.tc{block}.{number}", 2 * self.filters, 2 * width)
                width += self.filters
            affine(f"head.attention{block}", 2 * keys + values, width)
            width += values
        affine("head.output", spec.way, width)
        return params

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Examples:
        """Return the support set in random order."""
        order = prng.permutation(key, len(z))
        return Examples(z[order], one_hot(support.y, support.way).to(z.dtype)[order])

    def compare(self, weights: Params, learned: Examples, z: Tensor) -> Tensor:
        def affine(name: str, h: Tensor) -> Tensor:
            return F.linear(h, weights[f"head.{name}.weight"], weights[f"head.{name}.bias"])

        size = len(learned.z)
        # Rows are the steps of the support set, then the last step of each query's own sequence.
        step = torch.arange(size + len(z), device=z.device).clamp_max(size)
        is_own = torch.eye(len(step), dtype=torch.bool, device=z.device)
        sees = (step[:, None] > step) | is_own
        h = torch.cat([torch.cat([learned.z, z]), F.pad(learned.y, (0, 0, 0, len(z)))], -1)
        for block, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            for number in range(self.dense_blocks if block else 0):
                earlier = F.pad(h, (0, 0, 1, 0))[(step - 2**number + 1).clamp_min(0)]
                a, b = affine(f"tc{block}.{number}", torch.cat([earlier, h], -1)).chunk(2, -1)
                h = torch.cat([h, a.tanh() * b.sigmoid()], -1)
            q, k, v = affine(f"attention{block}", h).split([keys, keys, values], -1)
            share = (q @ k.T * keys**-0.5).masked_fill(~sees, -torch.inf).softmax(-1)
            h = torch.cat([h, share @ v], -1)
        return affine("output", h[size:])
