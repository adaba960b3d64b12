"""Make the parts of a run from its settings: method, task family, augmentation, device, folders."""

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import torch

from metalearn.algorithms.base import Algorithm
from metalearn.backbones.base import Backbone
from metalearn.config import components, plugins
from metalearn.config.arguments import check_arguments
from metalearn.config.schema import EpisodeShape, RunConfig
from metalearn.system import processes
from metalearn.system.errors import UserError
from metalearn.tasks.augment import AUGMENTATIONS, chain
from metalearn.tasks.family import Supervised, TaskFamily
from metalearn.tasks.losses import LOSSES
from metalearn.tasks.mixing import MIXINGS, Mixing, one_of
from metalearn.tasks.ranges import Ranges
from metalearn.tasks.sampling import Shape
from metalearn.tasks.store import Augmentation


def shapes_of(settings: EpisodeShape, where: str) -> tuple[Shape, Ranges | None]:
    """Return the largest shape of episodes, and the ranges of all shapes; None for a single one.

    `where` is the name of the settings in error messages.
    """
    (way, shot) = (
        (value[0], value[-1]) if isinstance(value, list) else (value, value)
        for value in (settings.way, settings.shot)
    )
    largest = Shape(
        way[1], shot[1], settings.query, settings.unlabelled, settings.distractors, where,
        sampler=settings.sampler, dirichlet=settings.dirichlet,
    )  # fmt: skip
    if way[0] == way[1] and shot[0] == shot[1] and not settings.unbalanced:
        return largest, None
    return largest, Ranges(way, shot, settings.unbalanced)


def family_of(settings: RunConfig) -> TaskFamily:
    """Return the task family of the dataset with the losses of `loss`, or raise UserError."""
    dataset = components.make(settings.dataset, "dataset")
    known: Any = LOSSES.get(dataset.target, {})
    functions, arguments = [], []
    for part, settings_part in (("name", "settings"), ("inner", "inner_settings")):
        name, own = getattr(settings.loss, part), getattr(settings.loss, settings_part)
        function: Any = name and plugins.find(name, known, f"loss.{part}")
        if function:
            own = _arguments(function, own, f"loss.{settings_part}", name)
        elif own:
            raise UserError(
                f"loss.{settings_part}.{next(iter(own))}: applies to loss.{part}, which is not set"
            )
        functions.append(function)
        arguments.append(own)
    if arguments[1]:
        functions[1] = functools.partial(functions[1], **arguments[1])
    family: TaskFamily = dataset.family(*functions, arguments[0])
    if settings.train.source != "episodes" or settings.episode.train.sampler != "hard":
        return family
    if not isinstance(family, Supervised):
        raise UserError(
            "episode.train.sampler=hard: the tasks of this dataset have no errors of classes; use "
            "episode.train.sampler=uniform"
        )
    return dataclasses.replace(family, counts_errors=True)


def _arguments(
    function: Callable[..., Any], values: dict[str, Any], where: str, name: str, count: int = 2
) -> dict[str, Any]:
    """Check settings of a function whose first `count` parameters are tensors."""
    tensors = list(inspect.signature(function).parameters)[:count]
    return check_arguments(function, values, where, name, tensors)


def augment_functions(settings: RunConfig, part: str) -> dict[str, Any]:
    """Return (function, checked settings) by name of "ops", "mix" or "support" of `augment`.

    Raise UserError for an unknown function or setting.
    """
    ops: dict[str, Any] = {}
    known: Any = MIXINGS if part == "mix" else AUGMENTATIONS
    for name, own in getattr(settings.augment, part).items():
        where = f"augment.{part}.{name}"
        if own is not None and not isinstance(own, dict):
            raise UserError(f"{where}={own}: should hold settings, like {{}}")
        own = dict(own or {})
        path = own.pop("_target_", None)
        named_by = f"{where}._target_" if path else f"augment.{part}"
        function: Any = plugins.find(str(path or name), known, named_by)
        ops[name] = function, _arguments(function, own, where, name, 3 if part == "mix" else 2)
    return ops


def augmentation_of(settings: RunConfig) -> Augmentation | None:
    """Return the augmentation of training inputs, or None."""
    ops = augment_functions(settings, "ops")
    return chain(ops) if ops else None


def support_augmentation_of(settings: RunConfig, algorithm: Algorithm) -> Augmentation | None:
    """Return the augmentation of the method's copies of support examples; None if it uses none.

    Raise UserError if it uses some, but there is no augmentation of them.
    """
    ops = augment_functions(settings, "support")
    if not algorithm.support_copies:
        return None
    if not ops:
        raise UserError(
            f"algo.support_copies={algorithm.support_copies}: augment.support has no augmentation "
            "of the copies; choose augment=crop_flip, or support_copies=0"
        )
    return chain(ops)


def mixing_of(settings: RunConfig) -> Mixing | None:
    """Return how training examples are mixed, or None."""
    ops = augment_functions(settings, "mix")
    return one_of(ops) if ops else None


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
    is_available = torch.cuda.is_available()
    if name == "cuda" and not is_available:
        raise UserError(
            "device=cuda: torch finds no CUDA device here; use device=cpu or device=auto"
        )
    use_cuda = is_available and name != "cpu"
    return torch.device("cuda", processes.local_rank()) if use_cuda else torch.device("cpu")


def data_folder(settings: RunConfig) -> Path:
    """Return `data_dir`, by default $METALEARN_DATA, which models need, or the user's."""
    given = settings.data_dir or os.environ.get("METALEARN_DATA")
    return _folder(given, platformdirs.user_data_path)


def cache_folder(settings: RunConfig) -> Path:
    """Return `cache_dir`, by default $METALEARN_CACHE, or the user's cache folder."""
    given = settings.cache_dir or os.environ.get("METALEARN_CACHE")
    return _folder(given, platformdirs.user_cache_path)


def _folder(path: str | None, default: Callable[..., Path]) -> Path:
    given = Path(path).expanduser() if path else default("metalearn", appauthor=False)
    return given.absolute()
