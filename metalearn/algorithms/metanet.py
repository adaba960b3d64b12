"""MetaNet: a meta-learner computes fast weights from the gradients of the support set."""

import dataclasses
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.geometry import cosine
from metalearn.algorithms.params import select
from metalearn.algorithms.preprocessing import size_and_sign
from metalearn.backbones.layers import init_weight
from metalearn.config.fields import at_least
from metalearn.tasks import prng
from metalearn.tasks.losses import cross_entropy
from metalearn.tasks.types import Params, Spec, State, Support

#: p of the gradient preprocessing: 7 in the authors' code, 10 in that of Andrychowicz et al.
_P = 7


class Memory(NamedTuple):
    """A learner of MetaNet."""

    #: Fast weights of the base learner for each support example, [M, H, D] and [M, N, H].
    fast: Params
    keys: Tensor  # representations of the support examples [M, R]
    representation: Tensor  # the task's fast weights of the representation layer [R, D]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaNet(EmbeddingAlgorithm):
    """A base learner with slow weights, and fast weights from attention over the support set.

    logits = b(W, W*; z), W* = sum_i softmax_i(cosine(r, r_i)) W*_i, W*_i = m(gradient of example i
    in W) (Munkhdalai and Yu 2017, algorithm 1 and 3.1 to 3.3).

    b is a base learner with one hidden layer and layer augmentation, relu(W z) + relu(W* z). r is a
    representation layer with fast weights of the task, which d computes from the gradients of r's
    own loss. m and d are networks of `meta_hidden` units that process each coordinate of a gradient
    alone, by magnitude and sign (Andrychowicz et al. 2016, appendix A).

    Departures: both networks share one backbone, which has only slow weights. d uses the mean of
    the gradients, the paper's alternative to its LSTM, so the order of the support set does not
    matter. m and d have one hidden layer.

    With `second_order`, meta-gradients also flow through the gradients that m and d use. In the
    authors' code they do not, so the output weights of r's own loss are never trained.
    """

    fixed_way: ClassVar[bool] = True
    takes_gradients: ClassVar[bool] = True
    class_equivariant: ClassVar[bool] = False  # the slow output weights differ from class to class

    hidden: int = at_least(1)
    representation: int = at_least(1)
    meta_hidden: int = at_least(1)
    second_order: bool

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        """Create the slow weights of b and r, and the networks m and d."""
        shapes = {
            "base.hidden": (self.hidden, size),
            "base.output": (spec.way, self.hidden),
            "represent.layer": (self.representation, size),
            "represent.output": (spec.way, self.representation),
        }
        params = {
            name: init_weight(prng.fold_in(key, number), *shape)
            for number, (name, shape) in enumerate(shapes.items())
        }
        for number, name in enumerate(("m", "d")):
            first, second = prng.fold_in(key, 10 + number), prng.fold_in(key, 20 + number)
            params[f"{name}.in"] = init_weight(first, self.meta_hidden, 2)
            params[f"{name}.in_bias"] = torch.zeros(self.meta_hidden, device=key.device)
            params[f"{name}.out"] = 0.1 * init_weight(second, 1, self.meta_hidden)
        return params

    def init(self, spec: Spec, key: Tensor) -> State:
        """Create the state; without `second_order`, "represent.output" is a buffer."""
        state = super().init(spec, key)
        if self.second_order:
            return state
        params = dict(state.params)
        return State(params, state.buffers | {"represent.output": params.pop("represent.output")})

    def written(self, weights: Params, gradient: Tensor) -> Tensor:
        """Compute fast weights from a gradient of the same shape, coordinate by coordinate."""
        if not self.second_order:
            gradient = gradient.detach()
        inputs = size_and_sign(gradient, _P)
        hidden = F.linear(inputs, weights["in"], weights["in_bias"]).relu()
        return F.linear(hidden, weights["out"]).squeeze(-1)

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Memory:
        def represent_loss(params: Params) -> Tensor:
            logits = F.linear(F.linear(z, params["layer"]).relu(), params["output"])
            return cross_entropy(logits, support.y)

        def base_loss(params: Params, z: Tensor, y: Tensor) -> Tensor:
            logits = F.linear(F.linear(z, params["hidden"]).relu(), params["output"])
            return cross_entropy(logits[None], y[None])

        task_gradient = grad(represent_loss)(select(weights, "represent"))["layer"]
        representation = self.written(select(weights, "d"), task_gradient)
        base, m = select(weights, "base"), select(weights, "m")
        gradients = vmap(grad(base_loss), in_dims=(None, 0, 0))(base, z, support.y)
        fast = {name: self.written(m, gradient) for name, gradient in gradients.items()}
        return Memory(fast, self.represented(weights, representation, z), representation)

    def represented(self, weights: Params, fast: Tensor, z: Tensor) -> Tensor:
        """Compute r with layer augmentation: [B, D] -> [B, R].

        As in the authors' code, there is no ReLU, so cosines may be negative.
        """
        return F.linear(z, weights["represent.layer"]) + F.linear(z, fast)

    def compare(self, weights: Params, learned: Memory, z: Tensor) -> Tensor:
        r = self.represented(weights, learned.representation, z)
        attention = cosine(r, learned.keys).softmax(-1)
        # W* z = sum_i a_i W*_i z, so W* of each query is never stored.
        fast_hidden = torch.einsum("qm,mhd,qd->qh", attention, learned.fast["hidden"], z)
        hidden = F.linear(z, weights["base.hidden"]).relu() + fast_hidden.relu()
        fast_output = torch.einsum("qm,mnh,qh->qn", attention, learned.fast["output"], hidden)
        return F.linear(hidden, weights["base.output"]) + fast_output
