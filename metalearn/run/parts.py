"""Make the parts of a run from its settings: method, task family, augmentation, device, folders."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import torch

from metalearn.algorithms.base import Algorithm
from metalearn.backbones.base import Backbone
from metalearn.config import components, plugins
from metalearn.config.arguments import check_arguments
from metalearn.config.schema import RunConfig
from metalearn.system import processes
from metalearn.system.errors import UserError
from metalearn.tasks import augment
from metalearn.tasks.family import TaskFamily
from metalearn.tasks.losses import LOSSES
from metalearn.tasks.store import Augmentation


def family_of(settings: RunConfig) -> TaskFamily:
    """Return the task family of the dataset with the losses of `loss`, or raise UserError."""
    dataset = components.make(settings.dataset, "dataset")
    known: Any = LOSSES.get(dataset.target, {})
    loss, inner = settings.loss.name, settings.loss.inner
    functions: list[Any] = [
        name and plugins.find(name, known, where)
        for name, where in ((loss, "loss.name"), (inner, "loss.inner"))
    ]
    own = settings.loss.settings
    if loss is not None:
        own = _arguments(functions[0], own, "loss.settings", loss)
    elif own:
        raise UserError(f"loss.settings.{next(iter(own))}: applies to loss.name, which is not set")
    family: TaskFamily = dataset.family(*functions, own)
    return family


def _arguments(
    function: Callable[..., Any], values: dict[str, Any], where: str, name: str
) -> dict[str, Any]:
    """Check settings of a function whose first two parameters are tensors."""
    tensors = list(inspect.signature(function).parameters)[:2]
    return check_arguments(function, values, where, name, tensors)


def augmentation_of(settings: RunConfig) -> Augmentation | None:
    """Return the augmentation of training inputs, or None; raise UserError for an unknown one."""
    ops: dict[str, Any] = {}
    known: Any = augment.AUGMENTATIONS
    for name, own in settings.augment.ops.items():
        function: Any = plugins.find(name, known, "augment.ops")
        if own is not None and not isinstance(own, dict):
            raise UserError(f"augment.ops.{name}={own}: should hold settings, like {{}}")
        ops[name] = (function, _arguments(function, own or {}, f"augment.ops.{name}", name))
    return augment.chain(ops) if ops else None


def algorithm_of(settings: RunConfig, is_restored: bool = False) -> Algorithm:
    """Return the method with its backbone, without pretrained weights if a checkpoint has them."""
    backbone: Backbone = components.make(settings.backbone, "backbone")
    algorithm: Algorithm = components.make(
        settings.algo,
        "algo",
        backbone=backbone.without_weights() if is_restored else backbone,
        statistics=settings.statistics,
        family=family_of(settings),
        source=settings.train.source,
        rematerialise=settings.engine.rematerialise,
    )
    return algorithm


def device_of(name: str) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda"; raise UserError if there is none."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError(
            "device=cuda: torch finds no CUDA device here; use device=cpu or device=auto"
        )
    return (
        torch.device("cuda", processes.local_rank())
        if available and name != "cpu"
        else torch.device("cpu")
    )


def data_folder(settings: RunConfig) -> Path:
    """Return `data_dir`, by default the user's data folder."""
    default = platformdirs.user_data_path("metalearn", appauthor=False)
    return _absolute(settings.data_dir, default)


def cache_folder(settings: RunConfig) -> Path:
    """Return `cache_dir`, by default the user's cache folder."""
    default = platformdirs.user_cache_path("metalearn", appauthor=False)
    return _absolute(settings.cache_dir, default)


def _absolute(path: str | None, default: Path) -> Path:
    return (Path(path).expanduser() if path else default).absolute()
