"""R2D2's network: four blocks, the last two of which make the embedding (Bertinetto et al. 2019, 4.2)."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.backbones.base import Backbone
from metalearn.backbones.layers import conv_norm, dropout, init_conv_norm
from metalearn.backbones.normalisation import Normaliser
from metalearn.errors import UserError
from metalearn.settings import at_least, between
from metalearn.tasks import prng
from metalearn.tasks.types import InputSpec, Params

_SLOPE = 0.1
_SHOWN = 2  # blocks that make the embedding, which are also those with dropout


@dataclasses.dataclass(frozen=True, kw_only=True)
class R2D2Conv(Backbone):
    """Blocks of 3x3 convolution, batch normalisation, 2x2 max-pooling, leaky ReLU (slope 0.1) and, in the last two, dropout. As in
    the authors' code the last one pools without a stride, the one before it is pooled so once more, and both side by side are the
    embedding: 8064 features of 32x32 pictures with the published filters. (The rerun of Lee et al. (2019) halves a fourth time
    instead and leaves the last activation out.)

    filters: of each block. dropout: while meta-training (theirs: 0.1 on miniImageNet, 0.4 on CIFAR-FS, none on Omniglot).
    """

    filters: list[int] = at_least(1)
    dropout: float = between(0, 0.9)

    def init(self, inputs: InputSpec, key: Tensor) -> tuple[Params, Params]:
        params: Params = {}
        population: Params = {}
        for block, (channels, filters) in enumerate(
            zip([inputs.shape[0], *self.filters], self.filters, strict=False)
        ):
            weights, statistics = init_conv_norm(
                str(block), prng.fold_in(key, block), filters, channels, 3
            )
            params |= weights
            population |= statistics
        return params, population

    def shape(self, inputs: InputSpec) -> tuple[int, ...]:
        blocks = len(self.filters)
        height, width = (size >> (blocks - 1) for size in inputs.shape[1:])
        if blocks < _SHOWN or min(height, width) < 2:
            raise UserError(
                f"backbone.filters={self.filters}: should be at least {_SHOWN} blocks; all but the last halve pictures of "
                f"{inputs.shape[1]}x{inputs.shape[2]}, and 2x2 places must be left"
            )
        return (sum(self.filters[-_SHOWN:]) * (height - 1) * (width - 1),)

    def forward(self, params: Params, x: Tensor, norm: Normaliser, key: Tensor | None) -> Tensor:
        last = len(self.filters) - 1
        shown = []
        for block in range(last + 1):
            x = F.leaky_relu(
                F.max_pool2d(conv_norm(norm, str(block), x), 2, stride=1 if block == last else 2),
                _SLOPE,
            )
            if block > last - _SHOWN:
                if key is not None and self.dropout:
                    x = dropout(x, self.dropout, prng.fold_in(key, block))
                shown.append((x if block == last else F.max_pool2d(x, 2, stride=1)).flatten(1))
        return torch.cat(shown, -1)
