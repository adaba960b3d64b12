"""An LSTM cell as a function, because `vmap` supports none of torch's recurrent modules."""

import torch
from torch import Tensor

from metalearn.tasks import prng
from metalearn.tasks.types import Params


def init_lstm(key: Tensor, size: int, hidden: int, inputs: int | None = None) -> Params:
    """Create the weights of an LSTM cell, uniform in +-1 / sqrt(size).

    The forget gates start open (bias 1; Jozefowicz et al. 2015).

    Args:
        key: int64 [].
        size: Size of cells and outputs.
        hidden: Size of the recurrent input [B, hidden].
        inputs: Size of inputs; None for `size`.
    """
    bound = size**-0.5

    def uniform(number: int, columns: int) -> Tensor:
        return bound * (2 * prng.uniform(prng.fold_in(key, number), (4 * size, columns)) - 1)

    bias = torch.zeros(4 * size, device=key.device)
    bias[size : 2 * size] = 1
    return {"input": uniform(0, inputs or size), "recurrent": uniform(1, hidden), "bias": bias}


def lstm_cell(weights: Params, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Compute one step of an LSTM (Hochreiter and Schmidhuber 1997, with forget gates).

    The order of the gates is torch's: input, forget, candidate, output.

    Args:
        weights: The result of `init_lstm`.
        x: Inputs [B, I].
        hidden: Recurrent input [B, H].
        cell: Cells [B, O].

    Returns:
        Outputs and cells, both [B, O].
    """
    gates = x @ weights["input"].T + hidden @ weights["recurrent"].T + weights["bias"]
    input_gate, forget, candidate, output = gates.chunk(4, -1)
    cell = forget.sigmoid() * cell + input_gate.sigmoid() * candidate.tanh()
    return output.sigmoid() * cell.tanh(), cell
