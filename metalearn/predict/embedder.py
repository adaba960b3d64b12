"""Embed images or texts with a pretrained network; features are cached on disk."""

import contextlib
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from metalearn.backbones.base import Backbone
from metalearn.backbones.preprocessing import Preprocessing
from metalearn.backbones.pretrained import Pretrained
from metalearn.config import components
from metalearn.data.files import open_image, plain
from metalearn.engine import channels_last
from metalearn.run import feature_cache
from metalearn.run.feature_cache import digest
from metalearn.system.errors import UserError, first_line, is_out_of_memory
from metalearn.tasks import prng
from metalearn.tasks.types import InputSpec, Tokenizer

#: Image files or PIL images; or texts.
Items = Sequence[Any]
#: Why some items cannot be read, by their index.
Reasons = dict[int, str] | None


class Network:
    """A frozen network; heads learn from its features."""

    #: What a saved classifier must find again; None if it cannot be saved.
    identity: str | None = None
    #: What it takes: "images", "texts", or "features" for a run on other inputs.
    kind: str = "images"
    way: int | None = None  # the number of classes that the examples must have; None for any
    #: Width of a pen stroke, as a share of the image's, if it was trained on handwriting.
    pen: float | None = None

    def represent(self, items: Items, unreadable: Reasons = None) -> np.ndarray:
        """Compute what is learned from: features, float32 [M, D].

        `unreadable` gets the reason for each item that cannot be read, by its index; its row has no
        meaning. None: raise UserError for the first.
        """
        raise NotImplementedError

    def pixels(self, images: Items) -> Tensor:
        """Return what `outputs_of` takes for images: float32 in [0, 1], [B, C, H, W]."""
        raise UserError("a classifier on a Python function cannot be exported; name a backbone")

    def preprocessing(self) -> dict[str, str]:
        """Describe in words how an image becomes an input of `outputs_of`."""
        return {"preprocessing": "as the dataset of the run reads its own images, divided by 255"}

    def outputs_of(self, x: Tensor) -> Tensor:
        """Compute features [B, D], or logits of an adapted run, of images in [0, 1], float32."""
        raise NotImplementedError


class _ImageReader:
    """How an image, a file or a PIL image, becomes an input: with `_TextReader` all differences."""

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
    """Apply a function to each item; the result is `blank` where it raises an exception.

    `unreadable` gets the reason for each such item, by its index; None: the first is a UserError.
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


class Embedder(Network):
    """A frozen pretrained network with settings as in conf/backbone; features are cached on disk.

    Without `cache_dir` there is no cache, and batches are as small as they are given. `progress` is
    called with the numbers of items done and of all. Raise UserError for a different network.
    """

    def __init__(
        self,
        backbone: dict[str, Any],
        device: torch.device,
        cache_dir: Path | None,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        network: Backbone = components.make(backbone, "backbone")
        self._reader: _ImageReader | _TextReader
        if isinstance(network, Pretrained):
            self._reader = _ImageReader(network.preprocessing)
        elif network.is_frozen and (tokenizer := network.tokenizer()) is not None:
            self._reader = _TextReader(tokenizer)
        else:
            raise UserError(f"backbone={type(network).__name__}: should be a pretrained network")
        self.kind = self._reader.kind
        self._network, self._device, self._cache_dir = network, device, cache_dir
        self._progress = progress
        key = prng.key_of(0, device=device)
        self._params, self._population = network.init(self._reader.inputs, key)
        tensors = self._params | self._population
        self._key = feature_cache.network_key(network, tensors, device, "fp32")
        self._params = channels_last(self._params)
        hashed = hashlib.sha256(repr(sorted(backbone.items())).encode())
        for name, value in sorted(tensors.items()):
            hashed.update(name.encode() + value.cpu().numpy().tobytes())
        self.identity = hashed.hexdigest()

    def represent(self, items: Items, unreadable: Reasons = None) -> np.ndarray:
        """Compute features; those of unreadable items are NaN."""
        kind, inputs = self.kind, self._reader.inputs
        failures: dict[int, str] = {}
        keys = read_each(
            items, self._reader.key, b"", kind, None if unreadable is None else failures
        )

        def load(indices: list[int]) -> Tensor:
            own: dict[int, str] = {}
            blank = torch.zeros(inputs.shape)
            chosen = [items[index] for index in indices]
            tensors = read_each(
                chosen, self._reader.tensor, blank, kind, None if unreadable is None else own
            )
            failures.update({indices[place]: reason for place, reason in own.items()})
            return pad_sequence(tensors, batch_first=True).to(self._device)

        size, folder = math.prod(self._network.shape(inputs)), self._cache_dir
        opened = feature_cache.opened(folder, self._key) if folder else contextlib.nullcontext()
        with opened as cache, torch.no_grad():
            z = feature_cache.embed_inputs(
                keys, load, self.outputs_of, size, cache, self._progress, failures,
                folder is not None,
            )  # fmt: skip
        z[list(failures)] = torch.nan
        if unreadable is not None:
            unreadable.update(failures)
        return z.numpy()

    def pixels(self, images: Items) -> Tensor:
        return torch.stack([self._reader.tensor(image) for image in images]).to(self._device)

    def preprocessing(self) -> dict[str, str]:
        assert isinstance(self._network, Pretrained)
        own = self._network.preprocessing
        return {
            "size": str(own.size),
            "resize": str(own.resize),
            "interpolation": own.interpolation,
            "preprocessing": f"resize the shorter side to {own.resize} ({own.interpolation}, "
            f"antialiased), crop the central {own.size}x{own.size}, RGB, divide by 255",
        }

    def outputs_of(self, x: Tensor) -> Tensor:
        return self._network.embed(self._params, channels_last(x), self._population)[0]
