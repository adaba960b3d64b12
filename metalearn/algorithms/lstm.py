"""An LSTM cell as a function, since `vmap` knows none of torch's recurrent modules."""

import torch
from torch import Tensor

from metalearn.tasks import prng
from metalearn.tasks.types import Params


def init_lstm(key: Tensor, inputs: int, hidden: int, outputs: int | None = None) -> Params:
    """Weights for inputs [B, inputs] and a recurrent input [B, hidden]; cells and outputs are `outputs` wide.

    Uniform in +-1 / sqrt(outputs), forget gates open at first (bias 1; Jozefowicz et al. 2015).
    outputs: None: as many as inputs.
    """
    size = outputs or inputs
    bound = size**-0.5

    def uniform(number: int, columns: int) -> Tensor:
        return bound * (2 * prng.uniform(prng.fold_in(key, number), (4 * size, columns)) - 1)

    bias = torch.zeros(4 * size, device=key.device)
    bias[size : 2 * size] = 1
    return {"input": uniform(0, inputs), "recurrent": uniform(1, hidden), "bias": bias}


def lstm_cell(weights: Params, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """One step (Hochreiter and Schmidhuber 1997, with forget gates): x [B, I], hidden [B, H], cell [B, O] -> both [B, O].

    Gates stand in the order of torch: input, forget, candidate, output.
    """
    gates = x @ weights["input"].T + hidden @ weights["recurrent"].T + weights["bias"]
    put, forget, candidate, show = gates.chunk(4, -1)
    cell = forget.sigmoid() * cell + put.sigmoid() * candidate.tanh()
    return show.sigmoid() * cell.tanh(), cell
