"""MetaNet: fast weights that a meta-learner writes from the gradients of the support set.

Munkhdalai and Yu (2017), "Meta networks".
"""

import dataclasses
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.geometry import cosine
from metalearn.algorithms.params import select
from metalearn.backbones.layers import init_weight
from metalearn.settings import at_least
from metalearn.tasks import prng
from metalearn.tasks.losses import cross_entropy
from metalearn.tasks.types import Params, Spec, State, Support

#: p of the preprocessing of gradients; 7 in the authors' code, 10 in that of Andrychowicz et al.
_P = 7


class Memory(NamedTuple):
    """fast: for each support example the fast weights of the base learner, [M, H, D] and [M, N, H]; keys: its
    representation [M, R]; representation: the task's fast weights of the representation layer [R, D].
    """

    fast: Params
    keys: Tensor
    representation: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaNet(EmbeddingAlgorithm):
    """logits = b(W, W*; z), W* = sum_i softmax_i(cosine(r, r_i)) W*_i, W*_i = m(gradient of example i in W) (Munkhdalai and Yu 2017,
    algorithm 1 and 3.1 to 3.3).

    b: a base learner of one hidden layer with layer augmentation, relu(W z) + relu(W* z); r: a representation layer with fast
    weights of the task, written by d from the gradients of its own loss; m, d: networks of `meta_hidden` units that see each
    coordinate of a gradient alone, by magnitude and sign (Andrychowicz et al. 2016, appendix A).
    second_order: whether meta-gradients also flow through the gradients that m and d read; in the authors' code they do not,
      so that the output weights of r's own loss stay as they began.
    Departures: both networks stand on one backbone whose weights are slow alone; d reads the mean of the gradients, the paper's
    alternative to its LSTM, so that the order of the support set does not matter; m and d have one hidden layer.
    """

    fixed_way: ClassVar[bool] = True
    class_equivariant: ClassVar[bool] = False  # the slow output weights differ from class to class

    hidden: int = at_least(1)
    representation: int = at_least(1)
    meta_hidden: int = at_least(1)
    second_order: bool

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        shapes = {
            "base.hidden": (self.hidden, size), "base.output": (spec.way, self.hidden),
            "represent.layer": (self.representation, size), "represent.output": (spec.way, self.representation),
        }  # fmt: skip
        found = {
            name: init_weight(prng.fold_in(key, number), *shape)
            for number, (name, shape) in enumerate(shapes.items())
        }
        for number, name in enumerate(("m", "d")):
            first, second = prng.fold_in(key, 10 + number), prng.fold_in(key, 20 + number)
            found[f"{name}.in"] = init_weight(first, self.meta_hidden, 2)
            found[f"{name}.in_bias"] = torch.zeros(self.meta_hidden, device=key.device)
            found[f"{name}.out"] = 0.1 * init_weight(second, 1, self.meta_hidden)
        return found

    def init(self, spec: Spec, key: Tensor) -> State:
        state = super().init(spec, key)
        if self.second_order:
            return state
        params = dict(state.params)
        return State(params, state.buffers | {"represent.output": params.pop("represent.output")})

    def written(self, weights: Params, gradient: Tensor) -> Tensor:
        """Fast weights from a gradient, coordinate by coordinate: the same shape."""
        if not self.second_order:
            gradient = gradient.detach()
        # log |g| / p where |g| >= exp(-p), and the sign; else -1 and exp(p) g (Andrychowicz et al. 2016, A).
        large = gradient.abs() >= torch.e**-_P
        size = torch.where(large, gradient.abs().clamp_min(torch.e**-_P).log() / _P, -1.0)
        sign = torch.where(large, gradient.sign(), gradient * torch.e**_P)
        hidden = F.linear(torch.stack([size, sign], -1), weights["in"], weights["in_bias"]).relu()
        return F.linear(hidden, weights["out"]).squeeze(-1)

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Memory:
        def represent_loss(own: Params) -> Tensor:
            return cross_entropy(
                F.linear(F.linear(z, own["layer"]).relu(), own["output"]), support.y
            )

        def base_loss(own: Params, z: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(
                F.linear(F.linear(z, own["hidden"]).relu(), own["output"])[None], y[None]
            )

        of_task = grad(represent_loss)(select(weights, "represent"))["layer"]
        representation = self.written(select(weights, "d"), of_task)
        gradients = vmap(grad(base_loss), in_dims=(None, 0, 0))(
            select(weights, "base"), z, support.y
        )
        fast = {
            name: self.written(select(weights, "m"), gradient)
            for name, gradient in gradients.items()
        }
        return Memory(fast, self.represented(weights, representation, z), representation)

    def represented(self, weights: Params, fast: Tensor, z: Tensor) -> Tensor:
        """R with layer augmentation: [B, D] -> [B, R]. As in the authors' code it is not rectified, so that cosines may be negative."""
        return F.linear(z, weights["represent.layer"]) + F.linear(z, fast)

    def compare(self, weights: Params, learned: Memory, z: Tensor) -> Tensor:
        attention = cosine(
            self.represented(weights, learned.representation, z), learned.keys
        ).softmax(-1)
        # W* z = sum_i a_i W*_i z: the fast weights of each query need not be written out.
        fast_hidden = torch.einsum("qm,mhd,qd->qh", attention, learned.fast["hidden"], z)
        hidden = F.linear(z, weights["base.hidden"]).relu() + fast_hidden.relu()
        fast_output = torch.einsum("qm,mnh,qh->qn", attention, learned.fast["output"], hidden)
        return F.linear(hidden, weights["base.output"]) + fast_output
