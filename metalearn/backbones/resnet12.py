"""ResNet-12 (Oreshkin et al. 2018; Lee et al. 2019, MetaOptNet, appendix A)."""

import dataclasses

import torch.nn.functional as F
from torch import Tensor

from metalearn.backbones.base import Backbone
from metalearn.backbones.layers import conv_norm, drop_block, dropout, init_conv_norms
from metalearn.backbones.normalisation import Normaliser
from metalearn.config.fields import at_least, between, choice
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.types import InputSpec, Params

_SLOPE = 0.1
_CONVOLUTIONS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNet12(Backbone):
    """Residual blocks of three 3x3 convolutions, a 1x1 shortcut convolution and 2x2 max-pooling.

    Each convolution has batch normalisation; activations are leaky ReLU (slope 0.1). Departures:
    DropBlock has its full rate from the first step (authors: rises over 40,000 steps), and weights
    are initialised by fan-in (authors: fan-out).

    `filters` are of each block (authors: 64, 160, 320, 640). Dropout follows each block in
    meta-training; DropBlock, with squares of `block_size`, may replace it in the last two blocks.
    """

    filters: list[int] = at_least(1)
    output: str = choice("flatten", "mean")
    dropout: float = between(0, 0.9)
    drop_block: bool
    block_size: int = at_least(1)

    def init(self, inputs: InputSpec, key: Tensor) -> tuple[Params, Params]:
        params: Params = {}
        population: Params = {}
        channels = inputs.shape[0]
        for block, filters in enumerate(self.filters):
            widths = [channels, *[filters] * (_CONVOLUTIONS - 1)]
            layers = [(f"{block}_{n}", filters, width, 3) for n, width in enumerate(widths)]
            layers.append((f"{block}_beside", filters, channels, 1))
            weights, statistics = init_conv_norms(prng.fold_in(key, block), layers)
            params |= weights
            population |= statistics
            channels = filters
        return params, population

    def shape(self, inputs: InputSpec) -> tuple[int, ...]:
        height, width = (extent >> len(self.filters) for extent in inputs.shape[1:])
        if height == 0 or width == 0:
            raise UserError(
                f"backbone.filters={self.filters}: too many blocks for images of "
                f"{inputs.shape[1]}x{inputs.shape[2]}, as each halves them; use fewer blocks or "
                "larger images"
            )
        return (
            (self.filters[-1], height, width) if self.output == "flatten" else (self.filters[-1],)
        )

    def forward(self, params: Params, x: Tensor, norm: Normaliser, key: Tensor | None) -> Tensor:
        for block in range(len(self.filters)):
            shortcut = conv_norm(norm, f"{block}_beside", x)
            for number in range(_CONVOLUTIONS):
                x = conv_norm(norm, f"{block}_{number}", x)
                if number < _CONVOLUTIONS - 1:
                    x = F.leaky_relu(x, _SLOPE)
            x = F.max_pool2d(F.leaky_relu(x + shortcut, _SLOPE), 2)
            if key is not None and self.dropout:
                noise = prng.fold_in(key, block)
                if self.drop_block and block >= len(self.filters) - 2:
                    x = drop_block(x, self.dropout, self.block_size, noise)
                else:
                    x = dropout(x, self.dropout, noise)
        return x.mean((-2, -1)) if self.output == "mean" else x.flatten(1)
