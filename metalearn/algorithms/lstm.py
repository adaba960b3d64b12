"""An LSTM cell as a function, because `vmap` supports none of torch's recurrent modules."""

import torch
from torch import Tensor

from metalearn.tasks import prng
from metalearn.tasks.types import Params


def init_lstm(key: Tensor, size: int, hidden: int, inputs: int | None = None) -> Params:
    """Create the weights of an LSTM cell of `size` features, uniform in +-1 / sqrt(size).

    The input is [B, inputs], or [B, size]; the recurrent input is [B, hidden]. Forget gates start
    open (bias 1; Jozefowicz et al. 2015).
    """
    bound = size**-0.5

    def uniform(number: int, columns: int) -> Tensor:
        return bound * (2 * prng.uniform(prng.fold_in(key, number), (4 * size, columns)) - 1)

    bias = torch.zeros(4 * size, device=key.device)
    bias[size : 2 * size] = 1
    return {"input": uniform(0, inputs or size), "recurrent": uniform(1, hidden), "bias": bias}


def lstm_cell(weights: Params, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Compute one step of an LSTM (Hochreiter and Schmidhuber 1997, with forget gates).

    The order of the gates is torch's: input, forget, candidate, output. Inputs x [B, I], recurrent
    input [B, H] and cells [B, O] give outputs and cells, both [B, O].
    """
    gates = x @ weights["input"].T + hidden @ weights["recurrent"].T + weights["bias"]
    input_gate, forget, candidate, output = gates.chunk(4, -1)
    cell = forget.sigmoid() * cell + input_gate.sigmoid() * candidate.tanh()
    return output.sigmoid() * cell.tanh(), cell
