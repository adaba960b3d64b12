"""Matching networks: predict a query's label by attention over the support examples."""

import dataclasses

import torch
from torch import Tensor

from metalearn.algorithms.embedding import EmbeddingAlgorithm, Examples
from metalearn.algorithms.geometry import cosine
from metalearn.algorithms.lstm import init_lstm, lstm_cell
from metalearn.algorithms.params import prefixed, select
from metalearn.config.fields import above, at_least
from metalearn.tasks import prng
from metalearn.tasks.types import Params, Spec, Support


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchingNetwork(EmbeddingAlgorithm):
    """Attention over the support examples by cosine similarity; predictions are log p.

    p(y | x) = sum_i a(x, x_i) y_i, with a the softmax of the cosine similarities (Vinyals et al.
    2016, eq. 1 and 2.1.1).

    With full context, a bidirectional LSTM embeds the support set in its order, and an LSTM with
    `processing_steps` steps embeds each query with attention to it (A.1, A.2). The paper has no
    temperature (1); then p stays flat, because cosines are in [-1, 1].
    """

    temperature: float = above(0)
    full_context: bool
    processing_steps: int = at_least(1)

    @property
    def support_order_matters(self) -> bool:  # type: ignore[override]
        """Return True with full context, where an LSTM reads the support set in order."""
        return self.full_context

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        if not self.full_context:
            return {}
        recurrent = {"forward": size, "backward": size, "attend": 2 * size}
        params: Params = {}
        for number, (part, hidden) in enumerate(recurrent.items()):
            params |= prefixed(init_lstm(prng.fold_in(key, number), size, hidden), part)
        return params

    def learn(self, weights: Params, z: Tensor, support: Support, key: Tensor) -> Examples:
        z = self.embed_in_context(weights, z) if self.full_context else z
        return super().learn(weights, z, support, key)

    def embed_in_context(self, weights: Params, z: Tensor) -> Tensor:
        """Embed the support set in context: [M, D] -> [M, D].

        g(x_i, S) = h_i forward + h_i backward + z_i (Vinyals et al. 2016, A.2).
        """

        def lstm(name: str, z: Tensor) -> Tensor:
            own, hidden, outputs = select(weights, name), torch.zeros_like(z[:1]), []
            cell = hidden
            for row in z.split(1):
                hidden, cell = lstm_cell(own, row, hidden, cell)
                outputs.append(hidden)
            return torch.cat(outputs)

        return lstm("forward", z) + lstm("backward", z.flip(0)).flip(0) + z

    def attending(self, weights: Params, z: Tensor, support_z: Tensor) -> Tensor:
        """Embed queries with attention to the support set: [Q, D] -> [Q, D].

        f(x, S) after the processing steps (Vinyals et al. 2016, A.1).
        """
        cell_weights, hidden, cell = select(weights, "attend"), z, torch.zeros_like(z)
        for _ in range(self.processing_steps):
            read = (hidden @ support_z.T).softmax(-1) @ support_z
            output, cell = lstm_cell(cell_weights, z, torch.cat([hidden, read], -1), cell)
            hidden = output + z
        return hidden

    def compare(self, weights: Params, learned: Examples, z: Tensor) -> Tensor:
        if self.full_context:
            z = self.attending(weights, z, learned.z)
        attention = (cosine(z, learned.z) / self.temperature).log_softmax(-1)
        # log sum_i a_i y_i over the examples of each class.
        return torch.where(learned.y.T > 0, attention[:, None, :], -torch.inf).logsumexp(-1)
