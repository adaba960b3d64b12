"""R2D2's network: the last two of four blocks give the embedding (Bertinetto et al. 2019, 4.2)."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.backbones.base import Backbone
from metalearn.backbones.layers import conv_norm, dropout, init_conv_norms
from metalearn.backbones.normalisation import Normaliser
from metalearn.config.fields import at_least, between
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.types import InputSpec, Params

_SLOPE = 0.1
_OUTPUT_BLOCKS = 2  # the last blocks: concatenated into the embedding, and with dropout


@dataclasses.dataclass(frozen=True, kw_only=True)
class R2D2Conv(Backbone):
    """Blocks of 3x3 convolution, batch normalisation, 2x2 max-pooling and leaky ReLU (slope 0.1).

    The last two blocks have dropout. As in the authors' code, the last block pools with stride 1.
    The output of the block before it is pooled with stride 1 again. Both are concatenated: 8064
    features for 32x32 images with the published filters. (The reimplementation of Lee et al. (2019)
    halves a fourth time instead and omits the last activation.)

    Authors' dropout: 0.1 on miniImageNet, 0.4 on CIFAR-FS, none on Omniglot.
    """

    filters: list[int] = at_least(1)
    dropout: float = between(0, 0.9)

    def init(self, inputs: InputSpec, key: Tensor) -> tuple[Params, Params]:
        channels = [inputs.shape[0], *self.filters]
        layers = zip(map(str, range(len(self.filters))), self.filters, channels, strict=False)
        return init_conv_norms(key, ((*layer, 3) for layer in layers))

    def shape(self, inputs: InputSpec) -> tuple[int, ...]:
        """Return the number of features; raise UserError for too few blocks or too small images."""
        blocks = len(self.filters)
        height, width = (size >> (blocks - 1) for size in inputs.shape[1:])
        if blocks < _OUTPUT_BLOCKS or min(height, width) < 2:
            raise UserError(
                f"backbone.filters={self.filters}: should be at least {_OUTPUT_BLOCKS} blocks, and "
                f"leave at least 2x2 pixels of images of {inputs.shape[1]}x{inputs.shape[2]} "
                "(each but the last halves them)"
            )
        return (sum(self.filters[-_OUTPUT_BLOCKS:]) * (height - 1) * (width - 1),)

    def forward(self, params: Params, x: Tensor, norm: Normaliser, key: Tensor | None) -> Tensor:
        last = len(self.filters) - 1
        outputs = []
        for block in range(last + 1):
            x = F.max_pool2d(conv_norm(norm, str(block), x), 2, stride=1 if block == last else 2)
            x = F.leaky_relu(x, _SLOPE)
            if block > last - _OUTPUT_BLOCKS:
                if key is not None and self.dropout:
                    x = dropout(x, self.dropout, prng.fold_in(key, block))
                outputs.append((x if block == last else F.max_pool2d(x, 2, stride=1)).flatten(1))
        return torch.cat(outputs, -1)
