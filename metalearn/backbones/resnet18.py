"""ResNet-18 as torchvision has it, with its weights where they are wanted (He et al. 2016)."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.backbones.base import Backbone
from metalearn.backbones.layers import conv_norm, init_conv_norm
from metalearn.backbones.normalisation import Normaliser
from metalearn.download import with_network
from metalearn.errors import UserError, first_line
from metalearn.tasks import prng
from metalearn.tasks.types import InputSpec, Params

_FILTERS = (64, 128, 256, 512)
_BLOCKS = 2
_COLOURS = 3


class _Layer(NamedTuple):
    """A convolution and its normalisation: our name, torchvision's names, sizes."""

    name: str
    convolution: str
    normalisation: str
    out: int
    channels: int
    size: int


def _layers() -> Iterator[_Layer]:
    yield _Layer("_stem", "conv1", "bn1", _FILTERS[0], _COLOURS, 7)
    channels = _FILTERS[0]
    for group, filters in enumerate(_FILTERS, 1):
        for block in range(_BLOCKS):
            where = f"layer{group}.{block}"
            if channels != filters:
                yield _Layer(f"{group}_{block}_beside", f"{where}.downsample.0", f"{where}.downsample.1", filters, channels, 1)  # fmt: skip
            yield _Layer(
                f"{group}_{block}_1", f"{where}.conv1", f"{where}.bn1", filters, channels, 3
            )
            yield _Layer(
                f"{group}_{block}_2", f"{where}.conv2", f"{where}.bn2", filters, filters, 3
            )
            channels = filters


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNet18(Backbone):
    """torchvision.models.resnet18 without its classifier: 512 features.

    weights: null for random ones, "imagenet" for torchvision's own (downloaded once into torch's hub folder), or a file with a
    state dict of that network, as torch.save writes it. frozen: neither meta-training nor adaptation changes the weights, and
    under statistics=population those that came with them are used. Pictures of one channel are shown in all three; a picture is
    halved five times, so small ones leave little (dataset.image_size=84 or more suits it). Pictures come standardised by the data set's own figures, not
    by ImageNet's.
    """

    weights: str | None
    frozen: bool

    @property
    def is_frozen(self) -> bool:
        return self.frozen

    def without_weights(self) -> "ResNet18":
        return dataclasses.replace(self, weights=None)

    def init(self, inputs: InputSpec, key: Tensor) -> tuple[Params, Params]:
        params: Params = {}
        population: Params = {}
        for number, layer in enumerate(_layers()):
            weights, statistics = init_conv_norm(
                layer.name, prng.fold_in(key, number), layer.out, layer.channels, layer.size
            )
            params |= weights
            population |= statistics
        if self.weights is not None:
            self._fill(
                params,
                population,
                _imagenet()
                if self.weights == "imagenet"
                else _read(Path(self.weights).expanduser()),
            )
        return params, population

    def _fill(self, params: Params, population: Params, given: dict[str, Any]) -> None:
        for layer in _layers():
            theirs = {f"conv{layer.name}.weight": f"{layer.convolution}.weight"}
            theirs |= {
                f"norm{layer.name}.{part}": f"{layer.normalisation}.{part}"
                for part in ("weight", "bias")
            }
            for ours, name in theirs.items():
                params[ours] = self._fitting(given, name, params[ours])
            for part in ("mean", "var"):
                ours = f"norm{layer.name}.{part}"
                population[ours] = self._fitting(
                    given, f"{layer.normalisation}.running_{part}", population[ours]
                )

    def _fitting(self, given: dict[str, Any], name: str, place: Tensor) -> Tensor:
        value = given.get(name)
        if not isinstance(value, Tensor) or value.shape != place.shape:
            found = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "missing"
            raise UserError(
                f"backbone.weights={self.weights}: {name} is {found}; should be a state dict of ResNet-18"
            )
        return value.to(place)

    def shape(self, inputs: InputSpec) -> tuple[int, ...]:
        if inputs.shape[0] not in (1, _COLOURS):
            raise UserError(
                f"backbone=resnet18 takes pictures of 1 or {_COLOURS} channels, not {inputs.shape[0]}"
            )
        return (_FILTERS[-1],)

    def forward(self, params: Params, x: Tensor, norm: Normaliser, key: Tensor | None) -> Tensor:
        x = F.relu(conv_norm(norm, "_stem", x.expand(-1, _COLOURS, -1, -1), stride=2))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for group in range(1, len(_FILTERS) + 1):
            for block in range(_BLOCKS):
                stride = 2 if group > 1 and block == 0 else 1
                beside = conv_norm(norm, f"{group}_{block}_beside", x, stride) if stride == 2 else x
                x = F.relu(conv_norm(norm, f"{group}_{block}_1", x, stride))
                x = F.relu(conv_norm(norm, f"{group}_{block}_2", x) + beside)
        return x.mean((-2, -1))


def _address() -> str:
    from torchvision.models import ResNet18_Weights  # seconds to import

    return str(ResNet18_Weights.IMAGENET1K_V1.url)


def _imagenet() -> dict[str, Any]:
    """Torchvision's own weights, from torch's hub folder or the network."""
    url = _address()
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.exists():
        checksum = path.stem.rsplit("-", 1)[-1]  # the first digits of its SHA-256 stand in the name
        with_network(
            url,
            path.parent,
            lambda: torch.hub.download_url_to_file(url, str(path), checksum, progress=False),
            "bring the file by hand: backbone.weights=<file>",
        )
    return _read(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch lets through whatever the bytes of a damaged file lead to
        raise UserError(
            f"backbone.weights={path}: is not a readable file of weights ({first_line(error)})"
        ) from None
    if not isinstance(found, dict):
        raise UserError(f"backbone.weights={path}: should be a state dict of ResNet-18")
    return found
