"""A memory-augmented neural network: an LSTM that stores the support set in an external memory.

Santoro, Bartunov, Botvinick, Wierstra and Lillicrap (2016), "Meta-learning with memory-augmented
neural networks".
"""

import dataclasses
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.geometry import cosine, one_hot
from metalearn.algorithms.lstm import init_lstm, lstm_cell
from metalearn.algorithms.params import prefixed, select
from metalearn.backbones.layers import init_weight
from metalearn.config.fields import at_least, between
from metalearn.tasks import prng
from metalearn.tasks.types import Params, Spec, Support


class Memory(NamedTuple):
    """What one step passes to the next; R reads, L locations.

    Attributes:
        label: Label of the last example, one-hot [1, N].
        hidden: Output of the controller and what was read, [1, H + R W].
        cell: Cells of the controller [1, H].
        rows: The memory M [L, W].
        read: Read weights w^r [R, L].
        usage: Usage weights w^u [L].
    """

    label: Tensor
    hidden: Tensor
    cell: Tensor
    rows: Tensor
    read: Tensor
    usage: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class MANN(EmbeddingAlgorithm):
    """An LSTM reads (z_t, y_(t-1)) and uses a memory M by least recently used access.

    From the output h_t of the controller come keys k_t, with tanh, and gates a_t (Santoro et al.
    2016, 3.1 and 3.2):
      w^w_t = sigmoid(a_t) w^r_(t-1) + (1 - sigmoid(a_t)) w^lu_(t-1)
      M_t   = M_(t-1), its least used locations set to zero, + w^w_t k_t
      w^r_t = softmax over locations of cos(k_t, M_t), r_t = w^r_t M_t
      w^u_t = decay w^u_(t-1) + w^r_t + w^w_t
    w^lu is 1 at the least used location, of read head j at the j-th least used, and 0 elsewhere.
    logits are linear in [h_t, r_t], which is also the recurrent input of the controller.

    A query is the step after the support set in random order, each from the same memory. The memory
    starts at zero.

    Departures: the loss is that of the queries (theirs: of all steps of one long sequence).

    Attributes:
        controller: Number of cells H (theirs: 200).
        locations: Number of locations L (theirs: 128).
        size: Size W of a location (theirs: 40).
        reads: Number of read heads R, each of which also writes (theirs: 4).
        decay: Of the usage weights (the paper gives no value).
    """

    fixed_way: ClassVar[bool] = True
    class_equivariant: ClassVar[bool] = False
    support_order_matters: ClassVar[bool] = True

    controller: int = at_least(1)
    locations: int = at_least(1)
    size: int = at_least(1)
    reads: int = at_least(1)
    decay: float = between(0, 1)

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        """Create the controller, the map to keys and gates, and the output."""
        keys = [prng.fold_in(key, number) for number in range(4)]
        state = self.controller + self.reads * self.size
        lstm = init_lstm(keys[0], self.controller, state)
        inputs = size + spec.way
        lstm["input"] = prng.normal(keys[1], (4 * self.controller, inputs)) * inputs**-0.5
        return prefixed(lstm, "head.lstm") | {
            "head.access": init_weight(keys[2], self.reads * (self.size + 1), self.controller),
            "head.output": prng.normal(keys[3], (spec.way, state)) * state**-0.5,
            "head.bias": torch.zeros(spec.way, device=key.device),
        }

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Memory:
        """Read the support set in random order."""
        order = prng.permutation(key, len(z))
        labels = one_hot(support.y, support.way).to(z.dtype)[order]
        zero = z.new_zeros
        memory = Memory(
            zero(1, support.way), zero(1, self.controller + self.reads * self.size),
            zero(1, self.controller), zero(self.locations, self.size),
            zero(self.reads, self.locations), zero(self.locations),
        )  # fmt: skip
        for row, label in zip(z[order].split(1), labels.split(1), strict=True):
            memory = self.step(weights, memory, row)._replace(label=label)
        return memory

    def step(self, weights: Params, memory: Memory, z: Tensor) -> Memory:
        """Read one embedding z [1, D] and access the memory."""
        hidden, cell = lstm_cell(
            select(weights, "head.lstm"),
            torch.cat([z, memory.label], -1),
            memory.hidden,
            memory.cell,
        )
        access = F.linear(hidden, weights["head.access"]).view(self.reads, self.size + 1)
        keys, gate = access[:, :-1].tanh(), access[:, -1:].sigmoid()
        least = memory.usage.argsort(stable=True)[: self.reads]
        is_least = one_hot(least, self.locations)
        write = gate * memory.read + (1 - gate) * is_least.to(z.dtype)
        rows = memory.rows.masked_fill(is_least.any(0)[:, None], 0) + write.T @ keys
        read = cosine(keys, rows).softmax(-1)
        usage = self.decay * memory.usage + (read + write).sum(0)
        hidden = torch.cat([hidden, (read @ rows).view(1, -1)], -1)
        return Memory(memory.label, hidden, cell, rows, read, usage)

    def compare(self, weights: Params, learned: Memory, z: Tensor) -> Tensor:
        last = vmap(lambda one: self.step(weights, learned, one[None]).hidden[0])(z)
        return F.linear(last, weights["head.output"], weights["head.bias"])
