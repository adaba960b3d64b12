"""LSTM meta-learner: an LSTM whose cells are the weights of the learner.

Ravi and Larochelle (2017), "Optimization as a model for few-shot learning".
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import grad_and_value

from metalearn.algorithms.linear_head import Adapted, LinearHeadAlgorithm
from metalearn.algorithms.lstm import init_lstm, lstm_cell
from metalearn.algorithms.params import prefixed, select
from metalearn.algorithms.preprocessing import size_and_sign
from metalearn.config.fields import at_least, choice
from metalearn.tasks import prng
from metalearn.tasks.types import Params, Spec, State, Support

#: p of the preprocessing of gradients and losses.
_P = 10
#: Bound of the initial weights of the gates, as in the authors' code.
_BOUND = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaLSTM(LinearHeadAlgorithm):
    """The update of each weight theta is that of an LSTM's cell, with learned gates.

    theta_t = f_t theta_t-1 - i_t g_t, with the gradient g_t of the support loss L_t, and
      h_t = LSTM([pre(L_t), pre(g_t)]; h_t-1)
      i_t = sigmoid(W_i [h_t, theta_t-1, i_t-1] + b_i)
      f_t = sigmoid(W_f [h_t, theta_t-1, f_t-1] + b_f)
    (Ravi and Larochelle 2017, eq. 2 and section 3). All weights share the LSTM and the gates; each
    has its own state. theta_0 is learned, h_0 = i_0 = f_0 = 0. pre gives size and sign (3.2). As in
    the paper, no gradient flows through L_t and g_t (3.3).

    Attributes:
        hidden: Units of the LSTM that reads loss and gradient (theirs: 20).
        inner_steps: Number of steps in meta-training.
        test_inner_steps: Number of steps in testing.
        input_bias: Initial b_i (theirs: -5 to -4); its sigmoid is the first learning rate.
        forget_bias: Initial b_f (theirs: 4 to 6).
        gate_inputs: What i_t-1 and f_t-1 are in W_i [...] and W_f [...]: "gates" as in the paper,
            or "logits", their values before the sigmoid, as in the authors' code.
    """

    targets: ClassVar[tuple[str, ...]] = ("class", "value")

    hidden: int = at_least(1)
    inner_steps: int = at_least(0, in_testing="test_inner_steps")
    test_inner_steps: int = at_least(0)
    input_bias: float
    forget_bias: float
    gate_inputs: str = choice("gates", "logits", default="gates")

    @property
    def training_steps(self) -> int:  # type: ignore[override]
        """Return the number of steps in meta-training."""
        return self.inner_steps

    def init(self, spec: Spec, key: Tensor) -> State:
        """Create theta_0, and under "meta." the LSTM and the gates."""
        state = super().init(spec, key)
        meta = prefixed(init_lstm(prng.fold_in(key, 100), self.hidden, self.hidden, 4), "lstm")
        biases = {"input": self.input_bias, "forget": self.forget_bias}
        for number, (name, bias) in enumerate(biases.items()):
            weight = prng.uniform(prng.fold_in(key, 101 + number), (self.hidden + 2,))
            meta[f"{name}.weight"] = _BOUND * (2 * weight - 1)
            meta[f"{name}.bias"] = torch.full((), bias, device=key.device)
        return State(state.params | prefixed(meta, "meta"), state.buffers)

    def adapt(
        self, state: State, support: Support, *, key: Tensor, steps: int | None = None
    ) -> Adapted:
        given, meta = self.given(state), select(state.params, "meta")
        # The forget gate would change the weights of a frozen network, which have no gradient.
        net = select(state.params, "net") if self.backbone.is_frozen else {}
        fixed = prefixed(net, "net")
        theta_0 = {
            name: value
            for name, value in state.params.items()
            if not name.startswith("meta.") and name not in fixed
        }
        sizes = [value.numel() for value in theta_0.values()]

        def named(theta_P: Tensor) -> Params:
            parts = zip(theta_0.items(), theta_P.split(sizes), strict=True)
            return fixed | {name: part.view_as(value) for (name, value), part in parts}

        def support_loss(theta_P: Tensor, key: Tensor) -> Tensor:
            return self.support_loss(named(theta_P), support, given, key)

        theta = torch.cat([value.flatten() for value in theta_0.values()])
        hidden = cell = theta.new_zeros(len(theta), self.hidden)
        memory = {name: torch.zeros_like(theta) for name in ("input", "forget")}
        gates: Params = {}
        for step in range(self.test_inner_steps if steps is None else steps):
            gradient, loss = grad_and_value(support_loss)(theta.detach(), prng.fold_in(key, step))
            gradient, loss = gradient.detach(), loss.detach()
            seen = [size_and_sign(loss.expand(len(theta)), _P), size_and_sign(gradient, _P)]
            hidden, cell = lstm_cell(select(meta, "lstm"), torch.cat(seen, -1), hidden, cell)
            for name, before in memory.items():
                inputs = torch.cat([hidden, theta[:, None], before[:, None]], -1)
                logits = inputs @ meta[f"{name}.weight"] + meta[f"{name}.bias"]
                gates[name] = logits.sigmoid()
                memory[name] = gates[name] if self.gate_inputs == "gates" else logits
            theta = gates["forget"] * theta - gates["input"] * gradient
        return self.adapted(named(theta), support.x)
