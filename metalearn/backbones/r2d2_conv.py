"""R2D2's network: four blocks, the last two of which make the embedding (Bertinetto et al. 2019, 4.2)."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn import random
from metalearn.backbones.layers import ConvNorm, dropout, init_conv_norm
from metalearn.errors import UserError
from metalearn.settings import above, at_least, between, given_by_run
from metalearn.types import Kernels, Params

_SLOPE = 0.1
_NOISY = 2  # blocks with dropout, which are also those that make the embedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class R2D2Conv:
    """Blocks of 3x3 convolution, batch normalisation, 2x2 max-pooling, leaky ReLU (slope 0.1) and, in the last two, dropout; the
    embedding is the outputs of the last two, side by side. The last block has no activation, as in the rerun of Lee et al. (2019).

    filters: of each block. dropout: while meta-training (theirs on CIFAR-FS and Omniglot: 0.1).
    """

    filters: list[int] = at_least(1)
    dropout: float = between(0, 0.9)
    eps: float = above(0)
    kernels: Kernels = given_by_run(Kernels())

    def init(self, input_shape: tuple[int, ...], key: Tensor) -> tuple[Params, Params]:
        params: Params = {}
        population: Params = {}
        for block, (channels, filters) in enumerate(zip([input_shape[0], *self.filters], self.filters, strict=False)):
            weights, statistics = init_conv_norm(str(block), random.fold_in(key, block), filters, channels, 3)
            params |= weights
            population |= statistics
        return params, population

    def shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        blocks = len(self.filters)
        places = [(input_shape[1] >> block) * (input_shape[2] >> block) for block in range(1, blocks + 1)]
        if blocks < _NOISY or places[-1] == 0:
            raise UserError(
                f"backbone.filters={self.filters}: should be at least {_NOISY} blocks, and no more than can halve pictures of "
                f"{input_shape[1]}x{input_shape[2]}"
            )
        return (sum(filters * place for filters, place in zip(self.filters[-_NOISY:], places[-_NOISY:], strict=True)),)

    def embed(
        self, params: Params, x: Tensor, given: Params | None = None, collect: bool = False, key: Tensor | None = None
    ) -> tuple[Tensor, Params]:
        """x [B, C, H, W] -> z [B, D]; see `metalearn.types.Backbone`."""
        conv_norm = ConvNorm(params, given, collect, self.eps, self.kernels)
        last = len(self.filters) - 1
        outputs = []
        for block in range(last + 1):
            x = F.max_pool2d(conv_norm(str(block), x), 2)
            if block < last:
                x = F.leaky_relu(x, _SLOPE)
            if key is not None and self.dropout and block > last - _NOISY:
                x = dropout(x, self.dropout, random.fold_in(key, block))
            outputs.append(x.flatten(1))
        return torch.cat(outputs[-_NOISY:], -1), conv_norm.seen
