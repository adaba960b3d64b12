"""Embed images or texts with a pretrained network; features are cached on disk."""

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from metalearn.backbones.base import Backbone
from metalearn.backbones.pretrained import Preprocessing, Pretrained
from metalearn.config import components
from metalearn.data.files import open_image, plain
from metalearn.engine import channels_last
from metalearn.run import feature_cache
from metalearn.run.feature_cache import digest
from metalearn.system.errors import UserError, first_line, is_out_of_memory
from metalearn.tasks import prng
from metalearn.tasks.types import InputSpec, Tokenizer


class Reader(Protocol):
    """How an item becomes an input of a network: all that differs between images and texts.

    Attributes:
        kind: "images" or "texts".
        inputs: Shape of an input; texts are as long as they are.
    """

    kind: str
    inputs: InputSpec

    def key(self, item: Any) -> bytes:
        """Return what tells the contents of items apart."""

    def tensor(self, item: Any) -> Tensor:
        """Return the input [*X]; raise any exception if the item cannot be read."""


class _ImageReader:
    """Images: files or PIL images."""

    kind = "images"

    def __init__(self, preprocessing: Preprocessing) -> None:
        self._preprocessing = preprocessing
        self.inputs = InputSpec((3, preprocessing.size, preprocessing.size))

    def key(self, item: Image.Image | str | Path) -> bytes:
        if not isinstance(item, Image.Image):
            return digest(Path(item).expanduser().read_bytes())
        return digest(repr((item.mode, item.size)).encode(), item.convert("RGBA").tobytes())

    def tensor(self, item: Image.Image | str | Path) -> Tensor:
        """Return an image as the network's input in [0, 1], [3, size, size]."""
        if not isinstance(item, Image.Image):
            with open_image(Path(item).expanduser()) as opened:
                return self.tensor(opened)
        array = np.asarray(self._preprocessing.crop(plain(item, "white", "RGB")))
        return torch.from_numpy(array.copy()).permute(2, 0, 1) / 255


class _TextReader:
    """Texts: strings that are not blank."""

    kind = "texts"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.inputs = InputSpec((1,), tokenizer.vocabulary)

    def key(self, item: str) -> bytes:
        return digest(checked_text(item).encode("utf-8", "surrogatepass"))

    def tensor(self, item: str) -> Tensor:
        """Return the tokens of a text, int64 [L]."""
        return self._tokenizer([checked_text(item)])[0]


def checked_text(item: Any) -> str:
    """Return a text; raise ValueError if it is blank, or no text."""
    if not isinstance(item, str):
        raise ValueError(f"it is no text but {type(item).__name__}")
    if not item.strip():
        raise ValueError("it is empty")
    return item


def read_each(
    items: Sequence[Any],
    read: Callable[[Any], Any],
    blank: Any,
    kind: str,
    unreadable: dict[int, str] | None,
) -> list[Any]:
    """Apply a function to each item.

    Args:
        items: Images or texts.
        read: The function.
        blank: Its result for an item for which it raises an exception.
        kind: "images" or "texts".
        unreadable: Gets the reason for each such item, by its index. None: the first is an error.

    Raises:
        UserError: For an item that cannot be read.
    """
    results = []
    for index, item in enumerate(items):
        try:
            results.append(read(item))
        except UserError:  # of the network, whatever the item
            raise
        except Exception as error:  # a corrupt file can raise any exception in Pillow
            if is_out_of_memory(error):
                raise
            if unreadable is None:
                is_file = kind == "images" and not isinstance(item, Image.Image)
                name = item if is_file else f"{kind[:-1]} {index}"
                raise UserError(
                    f"{name} is not a readable {kind[:-1]} ({first_line(error)})"
                ) from None
            unreadable[index] = first_line(error)
            results.append(blank)
    return results


class Embedder:
    """A frozen pretrained network.

    Args:
        backbone: Settings with `_target_`, as in conf/backbone/efficientnet_lite0.yaml.
        device: Where to compute.
        cache_dir: Folder of the cache; None for no cache, and batches as small as they are given.

    Attributes:
        network: The backbone.
        reader: How items become its inputs.
        tensors: Its weights and population statistics.

    Raises:
        UserError: If weights cannot be read, or the network is not a pretrained one.
    """

    def __init__(
        self, backbone: dict[str, Any], device: torch.device, cache_dir: Path | None
    ) -> None:
        network: Backbone = components.make(backbone, "backbone")
        self.reader: Reader
        if isinstance(network, Pretrained):
            self.reader = _ImageReader(network.preprocessing)
        elif network.is_frozen and (tokenizer := network.tokenizer()) is not None:
            self.reader = _TextReader(tokenizer)
        else:
            raise UserError(f"backbone={type(network).__name__}: should be a pretrained network")
        self.network, self._device, self._cache_dir = network, device, cache_dir
        inputs, key = self.reader.inputs, prng.key_of(0, device=device)
        self._params, self._population = network.init(inputs, key)
        self.tensors = self._params | self._population
        self._key = feature_cache.network_key(network, self.tensors, device, "fp32")
        self._params = channels_last(self._params)

    def features(self, x: Tensor) -> Tensor:
        """Compute features [B, D] of images in [0, 1], float32 [B, 3, size, size], or tokens."""
        return self.network.embed(self._params, channels_last(x), self._population)[0]

    def __call__(
        self,
        items: Sequence[Any],
        progress: Callable[[int, int], object] | None = None,
        unreadable: dict[int, str] | None = None,
    ) -> Tensor:
        """Embed images or texts.

        Args:
            items: Image files of any format and size, or PIL images; or texts, [M].
            progress: Called with the numbers of items done and of all.
            unreadable: Gets the reason for each item that cannot be read, by its index; its
                features are NaN. None: the first one is an error.

        Returns:
            Features, float32 [M, D], on the CPU.

        Raises:
            UserError: If items cannot be read, or the cache cannot be written.
        """
        kind, inputs = self.reader.kind, self.reader.inputs
        failures: dict[int, str] = {}
        keys = read_each(
            items, self.reader.key, b"", kind, None if unreadable is None else failures
        )

        def load(indices: list[int]) -> Tensor:
            own: dict[int, str] = {}
            blank = torch.zeros(inputs.shape)
            chosen = [items[index] for index in indices]
            tensors = read_each(
                chosen, self.reader.tensor, blank, kind, None if unreadable is None else own
            )
            failures.update({indices[place]: reason for place, reason in own.items()})
            return pad_sequence(tensors, batch_first=True).to(self._device)

        size, folder = math.prod(self.network.shape(inputs)), self._cache_dir
        opened = feature_cache.opened(folder, self._key) if folder else contextlib.nullcontext()
        with opened as cache, torch.no_grad():
            z = feature_cache.embed_inputs(
                keys, load, self.features, size, cache, progress, failures, folder is not None
            )
        z[list(failures)] = torch.nan
        if unreadable is not None:
            unreadable.update(failures)
        return z

    def pixels(self, images: Sequence[Image.Image | Path]) -> Tensor:
        """Return images as the network's inputs in [0, 1], float32 [B, 3, size, size]."""
        return torch.stack([self.reader.tensor(image) for image in images]).to(self._device)
