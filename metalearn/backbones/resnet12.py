"""ResNet-12, the residual network of few-shot learning (Oreshkin et al. 2018; Lee et al. 2019, MetaOptNet, A)."""

import dataclasses

import torch.nn.functional as F
from torch import Tensor

from metalearn import random
from metalearn.backbones.layers import ConvNorm, drop_block, dropout, init_conv_norm
from metalearn.errors import UserError
from metalearn.settings import above, at_least, between, choice, given_by_run
from metalearn.types import Kernels, Params

_SLOPE = 0.1
_CONVOLUTIONS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNet12:
    """Residual blocks of three 3x3 convolutions with batch normalisation and leaky ReLU (slope 0.1), a 1x1 convolution beside
    them, and 2x2 max-pooling.

    filters: of each block (theirs: 64, 160, 320, 640). output: "mean" over positions, or "flatten". While meta-training, dropout
    follows each block, in its place DropBlock the last two where drop_block is true. Departures: DropBlock has its full rate from
    the first step (theirs rises over 40,000 steps), and weights start by fan-in (theirs by fan-out).
    """

    filters: list[int] = at_least(1)
    output: str = choice("flatten", "mean")
    dropout: float = between(0, 0.9)
    drop_block: bool
    block_size: int = at_least(1)
    eps: float = above(0)
    kernels: Kernels = given_by_run(Kernels())

    def init(self, input_shape: tuple[int, ...], key: Tensor) -> tuple[Params, Params]:
        params: Params = {}
        population: Params = {}
        channels = input_shape[0]
        for block, filters in enumerate(self.filters):
            key_of_block = random.fold_in(key, block)
            layers = [(f"{block}_{number}", filters if number else channels, 3) for number in range(_CONVOLUTIONS)]
            for number, (name, inputs, size) in enumerate([*layers, (f"{block}_beside", channels, 1)]):
                weights, statistics = init_conv_norm(name, random.fold_in(key_of_block, number), filters, inputs, size)
                params |= weights
                population |= statistics
            channels = filters
        return params, population

    def shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        height, width = (extent >> len(self.filters) for extent in input_shape[1:])
        if height == 0 or width == 0:
            raise UserError(
                f"backbone.filters={self.filters}: so many blocks halve pictures of {input_shape[1]}x{input_shape[2]} to "
                "nothing; use fewer, or larger pictures"
            )
        return (self.filters[-1], height, width) if self.output == "flatten" else (self.filters[-1],)

    def embed(
        self, params: Params, x: Tensor, given: Params | None = None, collect: bool = False, key: Tensor | None = None
    ) -> tuple[Tensor, Params]:
        """x [B, C, H, W] -> z [B, D]; see `metalearn.types.Backbone`."""
        conv_norm = ConvNorm(params, given, collect, self.eps, self.kernels)
        for block in range(len(self.filters)):
            beside = conv_norm(f"{block}_beside", x)
            for number in range(_CONVOLUTIONS):
                x = conv_norm(f"{block}_{number}", x)
                if number < _CONVOLUTIONS - 1:
                    x = F.leaky_relu(x, _SLOPE)
            x = F.max_pool2d(F.leaky_relu(x + beside, _SLOPE), 2)
            if key is not None and self.dropout:
                noise = random.fold_in(key, block)
                if self.drop_block and block >= len(self.filters) - 2:
                    x = drop_block(x, self.dropout, self.block_size, noise)
                else:
                    x = dropout(x, self.dropout, noise)
        return (x.mean((-2, -1)) if self.output == "mean" else x.flatten(1)), conv_norm.seen
