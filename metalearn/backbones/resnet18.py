"""ResNet-18 of torchvision, optionally with its weights (He et al. 2016)."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from metalearn.backbones import weights
from metalearn.backbones.base import FreezableBackbone
from metalearn.backbones.layers import conv_norm, init_conv_norms
from metalearn.backbones.normalisation import Normaliser
from metalearn.system.errors import UserError
from metalearn.tasks.types import InputSpec, Params

_FILTERS = (64, 128, 256, 512)
_BLOCKS = 2
_COLOURS = 3
_NAME = "ResNet-18"
#: Ends one name of a state dict of this network only; what precedes it there precedes all names.
_UNIQUE = "layer1.0.conv1.weight"


class _Layer(NamedTuple):
    """A convolution and its normalisation: name here and sizes, and their names in torchvision."""

    own: tuple[str, int, int, int]
    convolution: str
    normalisation: str


def _layers() -> Iterator[_Layer]:
    channels = _FILTERS[0]
    yield _Layer(("_stem", channels, _COLOURS, 7), "conv1", "bn1")
    for group, filters in enumerate(_FILTERS, 1):
        for block in range(_BLOCKS):
            name, theirs = f"{group}_{block}", f"layer{group}.{block}"
            if channels != filters:
                beside = (f"{name}_beside", filters, channels, 1)
                yield _Layer(beside, f"{theirs}.downsample.0", f"{theirs}.downsample.1")
            yield _Layer((f"{name}_1", filters, channels, 3), f"{theirs}.conv1", f"{theirs}.bn1")
            yield _Layer((f"{name}_2", filters, filters, 3), f"{theirs}.conv2", f"{theirs}.bn2")
            channels = filters


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNet18(FreezableBackbone):
    """torchvision.models.resnet18 without its classifier: 512 features.

    Images with one channel are repeated in all three. Images are halved five times, so use
    dataset.image_size=84 or more. They are standardised with the dataset's own statistics, not
    ImageNet's. `weights` are random (None), torchvision's ("imagenet", downloaded once into torch's
    hub folder), or a file with a state dict of that network, saved with torch.save; also inside a
    checkpoint's "state_dict" or "model", or with a prefix such as "module.". If they are frozen,
    and with statistics=population, the statistics loaded with the weights are used.
    """

    weights: str | None

    def without_weights(self) -> "ResNet18":
        return dataclasses.replace(self, weights=None)

    def init(self, inputs: InputSpec, key: Tensor) -> tuple[Params, Params]:
        params, population = init_conv_norms(key, (layer.own for layer in _layers()))
        if self.weights is not None:
            is_hub = self.weights == "imagenet"
            path = weights.download(_address()) if is_hub else Path(self.weights).expanduser()
            stored = weights.read(path, _UNIQUE, _NAME)

            def load(tensors: Params, ours: str, theirs: str) -> None:
                tensors[ours] = weights.tensor(stored, theirs, tensors[ours], self.weights, _NAME)

            for (name, *_), convolution, norm in _layers():
                load(params, f"conv{name}.weight", f"{convolution}.weight")
                for part in ("weight", "bias"):
                    load(params, f"norm{name}.{part}", f"{norm}.{part}")
                for part in ("mean", "var"):
                    load(population, f"norm{name}.{part}", f"{norm}.running_{part}")
        return params, population

    def shape(self, inputs: InputSpec) -> tuple[int, ...]:
        """Return (512,); raise UserError unless images have 1 or 3 channels."""
        if inputs.shape[0] not in (1, _COLOURS):
            raise UserError(
                f"backbone=resnet18: images have {inputs.shape[0]} channels; "
                f"should be 1 or {_COLOURS}"
            )
        return (_FILTERS[-1],)

    def forward(self, params: Params, x: Tensor, norm: Normaliser, key: Tensor | None) -> Tensor:
        x = F.relu(conv_norm(norm, "_stem", x.expand(-1, _COLOURS, -1, -1), stride=2))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for group in range(1, len(_FILTERS) + 1):
            for block in range(_BLOCKS):
                stride = 2 if group > 1 and block == 0 else 1
                shortcut = x
                if stride == 2:
                    shortcut = conv_norm(norm, f"{group}_{block}_beside", x, stride)
                x = F.relu(conv_norm(norm, f"{group}_{block}_1", x, stride))
                x = F.relu(conv_norm(norm, f"{group}_{block}_2", x) + shortcut)
        return x.mean((-2, -1))


def _address() -> str:
    from torchvision.models import ResNet18_Weights  # takes seconds to import

    return str(ResNet18_Weights.IMAGENET1K_V1.url)
