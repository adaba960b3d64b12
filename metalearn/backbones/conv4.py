"""The four-block convolutional network of few-shot learning (Vinyals et al. 2016, 4.1.1)."""

import dataclasses

import torch.nn.functional as F
from torch import Tensor

from metalearn.backbones.base import Backbone
from metalearn.backbones.layers import ACTIVATIONS, conv_norm_act, init_conv_norms
from metalearn.backbones.normalisation import Normaliser
from metalearn.config.fields import at_least, choice
from metalearn.system.errors import UserError
from metalearn.tasks.types import InputSpec, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conv4(Backbone):
    """Blocks of 3x3 convolution, normalisation, activation and downsampling by 2.

    Convolutions have a bias only if no normalisation follows.

    `downsample` is "pool" (stride 1, then 2x2 max-pooling: Vinyals, Snell) or "stride" (stride 2,
    no pooling: Finn on Omniglot); `output` is "flatten", or "mean" over positions.
    """

    filters: int = at_least(1)
    blocks: int = at_least(1)
    halvings: int | None = at_least(0, default=None)
    downsample: str = choice("pool", "stride")
    output: str = choice("flatten", "mean")
    normalisation: str = choice("batch", "none")
    activation: str = choice(*ACTIVATIONS)

    @property
    def normalises(self) -> bool:  # type: ignore[override]
        """Return True unless the setting `normalisation` is "none"."""
        return self.normalisation != "none"

    def init(self, inputs: InputSpec, key: Tensor) -> tuple[Params, Params]:
        channels = [inputs.shape[0], *[self.filters] * (self.blocks - 1)]
        layers = [(str(block), self.filters, one, 3) for block, one in enumerate(channels)]
        params, population = init_conv_norms(key, layers)
        if self.normalises:
            return params, population
        return {
            name.replace("norm", "conv"): value
            for name, value in params.items()
            if name.startswith("conv") or name.endswith("bias")
        }, {}

    def halves(self, block: int) -> bool:
        """Return whether a block halves height and width."""
        return self.halvings is None or block < self.halvings

    def shape(self, inputs: InputSpec) -> tuple[int, ...]:
        height, width = start = inputs.shape[1:]
        for _ in filter(self.halves, range(self.blocks)):
            rounding = int(self.downsample == "stride")
            height, width = (height + rounding) // 2, (width + rounding) // 2
        if height == 0 or width == 0:
            raise UserError(
                f"backbone.blocks={self.blocks} halve {start[0]}x{start[1]} images too often; "
                "use fewer blocks, fewer backbone.halvings, larger images or "
                "backbone.downsample=stride"
            )
        return (self.filters, height, width) if self.output == "flatten" else (self.filters,)

    def forward(self, params: Params, x: Tensor, norm: Normaliser, key: Tensor | None) -> Tensor:
        for block in range(self.blocks):
            stride = 2 if self.halves(block) and self.downsample == "stride" else 1
            x = conv_norm_act(norm, str(block), x, stride, self.activation)
            if self.halves(block) and self.downsample == "pool":
                x = F.max_pool2d(x, 2)
        return x.mean((-2, -1)) if self.output == "mean" else x.flatten(1)
