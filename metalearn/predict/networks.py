"""Networks under a classifier: they turn images or texts into what it learns from.

The only place that opens a backbone or a run for `FewShotClassifier`.
"""

import copy
import hashlib
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metalearn.config import checking, paths
from metalearn.config.choices import options
from metalearn.config.composition import compose_config
from metalearn.engine import process
from metalearn.predict.confidence import Outputs
from metalearn.predict.embedder import Embedder, Items, Network, Reasons, checked_text, read_each
from metalearn.report.folder import RunFolder
from metalearn.run import load
from metalearn.run.parts import cache_folder, device_of
from metalearn.system.errors import UserError, nearest

#: Items -> features, float [M, D].
Embedding = Callable[[list[Any]], Any]


class Function(Network):
    """A Python function that embeds images or texts."""

    def __init__(self, embedding: Embedding) -> None:
        self._embedding = embedding

    def represent(self, items: Items, unreadable: Reasons = None) -> np.ndarray:
        return np.asarray(self._embedding(list(items)), dtype=np.float32)


class RunFeatures(Network):
    """The meta-trained backbone of a run."""

    def __init__(self, run: str | Path) -> None:
        self._model = load.load(run)
        kind = self._model.spec.inputs.kind
        self.kind = "texts" if kind == "tokens" else kind
        if self._model.spec.target != "class":
            raise UserError(f"run={run}: predicts values, not classes")
        if not isinstance(self, AdaptingRun) and not self._model.embeds_alone:
            raise UserError(
                f"run={run}: its features depend on the other images, so no head can learn from "
                "them; leave out head="
            )
        if isinstance(self, AdaptingRun) and self._model.is_transductive:
            raise UserError(
                f"run={run}: its predictions depend on the other queries, so an image alone has no "
                "label; choose a head, such as head=ridge"
            )
        self.identity = hashlib.sha256(RunFolder(Path(run)).best.read_bytes()).hexdigest()
        self.way = self._model.way if isinstance(self, AdaptingRun) else None
        self.pen = self._model.pen

    def _read(self, items: Items, unreadable: Reasons) -> np.ndarray:
        shape, is_text = self._model.spec.input_shape, self.kind == "texts"
        blank = np.zeros(shape, np.int64 if is_text else np.uint8)

        def read(item: Any) -> np.ndarray:
            array: np.ndarray = self._model.read(checked_text(item) if is_text else item).numpy()
            return array

        arrays = read_each(items, read, blank, self.kind, unreadable)
        return np.stack([blank, *arrays])[1:]

    def represent(self, items: Items, unreadable: Reasons = None) -> np.ndarray:
        return self._model.embed(self._read(items, unreadable)).cpu().numpy()

    def pixels(self, images: Items) -> Tensor:
        return torch.from_numpy(self._read(images, None) / np.float32(255)).to(self._model.device)

    def outputs_of(self, x: Tensor) -> Tensor:
        return self._model.tensor_outputs(x, embed=True)


class AdaptingRun(RunFeatures):
    """A run that adapts to the examples as it was trained to."""

    def represent(self, items: Items, unreadable: Reasons = None) -> np.ndarray:
        """Read items as the run's dataset does: uint8 [M, C, H, W], or tokens, int64 [M, L]."""
        return self._read(items, unreadable)

    def outputs_of(self, x: Tensor) -> Tensor:
        """Compute logits, in the order of the sorted classes."""
        order = np.argsort(np.array(self._model.classes))
        return self._model.tensor_outputs(x)[:, torch.from_numpy(order)]

    def adapt(self, x: np.ndarray, y: np.ndarray) -> None:
        """Adapt to examples [M, …] of classes [M]; a copy of this object stays as it was."""
        self._model = copy.copy(self._model).adapt(x, y.tolist())

    def procedure(self, x: np.ndarray, y: np.ndarray, way: int, queries: np.ndarray) -> Outputs:
        """Adapt to examples and predict queries: a `Procedure` of cross-validation."""
        self.adapt(x, y)
        return self.outputs(queries)

    def outputs(self, x: np.ndarray) -> Outputs:
        """Predict after `adapt`. The novelty is the probability of not being the likely class."""
        probabilities = self._model.probabilities(x).double().cpu().numpy()
        probabilities = probabilities[:, np.argsort(np.array(self._model.classes))]
        novelty = 1 - probabilities.max(1, initial=0)
        return Outputs(np.log(probabilities.clip(1e-30)), novelty)


def _pretrained(backbone: str, is_cached: bool) -> Embedder:
    """Open a backbone: its name, followed by settings such as backbone.model=resnet18."""
    name, *settings = shlex.split(backbone) or [""]
    if name not in (known := options("backbone")):
        raise UserError(f"backbone={name}: there is no such backbone{nearest(name, known)}")
    if other := [word for word in settings if not word.startswith("backbone.")]:
        raise UserError(f"backbone={backbone}: {other[0]} is no setting of a backbone")
    words = [paths.literal(word, False) for word in settings]
    config = checking.check_config(compose_config([f"backbone={name}", *words]))
    device = device_of(config.device)
    process.prepare(device, config.engine.threads, config.engine.precision)
    cache = cache_folder(config) if is_cached else None
    progress = _show if is_cached and sys.stderr.isatty() else None
    return Embedder(config.backbone, device, cache, progress)


def _show(done: int, count: int) -> None:
    """Show the progress on a terminal."""
    print(f"\r{done} of {count} embedded", end="\n" if done == count else "", file=sys.stderr)


def open_network(
    backbone: str | Embedding | None, run: str | Path | None, has_head: bool, is_cached: bool = True
) -> Network | None:
    """Open a pretrained backbone by name, a function that embeds items, or a run.

    `has_head`: a head learns from the run's features, instead of the run's own method. Return None
    if nothing is given, for feature vectors. Raise UserError if there is no such network, or both
    are given.
    """
    if run is not None and backbone is not None:
        raise UserError("backbone= and run=: give one of them")
    if run is not None:
        return RunFeatures(run) if has_head else AdaptingRun(run)
    if isinstance(backbone, str):
        return _pretrained(backbone, is_cached)
    if backbone is not None and not callable(backbone):
        raise UserError(f"backbone={backbone}: should be a name, a function of images, or None")
    return None if backbone is None else Function(backbone)
