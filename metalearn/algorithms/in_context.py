"""In-context learning: a transformer reads labelled examples and a query, and predicts its label.

Fifty, Duan, Junkins, Amid, Leskovec, Re and Thrun (2024), "Context-aware meta-learning" (CAML).
"""

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.params import prefixed, select
from metalearn.backbones.layers import init_weight
from metalearn.backbones.transformer import init_transformer, transformer
from metalearn.config.fields import at_least
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.types import Params, Spec, Support


class Context(NamedTuple):
    """Examples [M, D + L], embedding and label; outputs of the classes or values, int64 [N]."""

    examples: Tensor
    outputs: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class InContext(EmbeddingAlgorithm):
    """prediction(x) = W T({(z(x), u)} and all (z_i, l_i)), T a transformer that masks nothing.

    The token of the query has the learned label u; prediction reads its output (Fifty et al. 2024,
    3.2). The label l_i of class n is a code c_n: all codes have length 1 and the same angle between
    any two (ELMES, 3.3), c_n = sqrt(L / (L - 1)) (e_n - 1 / L). In each task, classes get different
    codes at random; W has one output per code. The label of a value is the value.

    T has no positions, so the order of examples does not matter. Each query has a sequence of its
    own, so predictions are independent of each other.

    Departures: the backbone may be trained (theirs: frozen CLIP), a linear layer maps embedding and
    label to `width` (theirs: concatenation), and codes may outnumber classes; theirs is only for
    classes, values are as in Garg et al. (2022).

    Attributes:
        layers: Number of layers of T (theirs: 24).
        width: Number of features of a token (theirs: 1,024).
        heads: Number of attention heads, a divisor of `width` (theirs: 16).
        codes: Number of codes L, the most classes that a task can have; None: as in training.
    """

    targets: ClassVar[tuple[str, ...]] = ("class", "value")
    class_equivariant: ClassVar[bool] = False  # each code has its own output weights
    is_iterative: ClassVar[bool] = True  # many small operations on few tokens

    layers: int = at_least(1)
    width: int = at_least(1)
    heads: int = at_least(1)
    codes: int | None = at_least(2)

    @property
    def fixed_way(self) -> bool:  # type: ignore[override]
        """Return True if there are as many codes as classes."""
        return self.codes is None

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        """Create T, the map to its tokens, the label of queries, and W."""
        if self.width % self.heads:
            raise UserError(f"algo.heads={self.heads}: should divide algo.width={self.width}")
        labels = self.codes if self.codes and spec.target == "class" else spec.way
        _check_codes(labels, spec.way)
        token = init_weight(prng.fold_in(key, 0), self.width, size + labels)
        net = init_transformer(key, self.layers, self.width) | {
            "token": token,
            "unknown": torch.zeros(labels, device=key.device),
            "output": prng.normal(prng.fold_in(key, 1), (labels, self.width)) * self.width**-0.5,
        }
        return prefixed(net, "head")

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Context:
        if support.y.is_floating_point():
            outputs = torch.arange(support.way, device=z.device)
            return Context(torch.cat([z, support.y.to(z.dtype)], -1), outputs)
        codes = len(weights["head.unknown"])
        _check_codes(codes, support.way)
        outputs = prng.permutation(key, codes)[: support.way]
        labels = equiangular(codes, z.device)[outputs[support.y]].to(z.dtype)
        return Context(torch.cat([z, labels], -1), outputs)

    def compare(self, weights: Params, learned: Context, z: Tensor) -> Tensor:
        head = select(weights, "head")
        count = z.shape[0]  # len(z) would be a constant of an exported graph
        queries = torch.cat([z, head["unknown"].expand(count, -1)], -1) @ head["token"].T
        examples = (learned.examples @ head["token"].T).expand(count, -1, -1)
        tokens = torch.cat([queries[:, None], examples], 1)
        seen = transformer(head, tokens, self.layers, self.heads, self.backbone.eps)[:, 0]
        return seen @ head["output"][learned.outputs].T


def _check_codes(codes: int, way: int) -> None:
    """Raise UserError if a task has more classes than there are codes."""
    if way > codes:
        raise UserError(f"algo.codes={codes}: should be at least {way}, the number of classes")


def equiangular(size: int, device: torch.device) -> Tensor:
    """Compute codes of length 1 with the same, largest possible angle: the rows of [L, L]."""
    return (size / (size - 1)) ** 0.5 * (torch.eye(size, device=device) - 1 / size)
