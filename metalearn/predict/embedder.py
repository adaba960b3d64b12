"""Embed images with a pretrained network and its own preprocessing; features are cached on disk."""

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metalearn.backbones.pretrained import Pretrained
from metalearn.config import components
from metalearn.data.files import open_image, plain
from metalearn.engine import channels_last
from metalearn.run import feature_cache
from metalearn.run.feature_cache import digest
from metalearn.system.errors import UserError, first_line, is_out_of_memory
from metalearn.tasks import prng
from metalearn.tasks.types import InputSpec


class ImageEmbedder:
    """A frozen pretrained network.

    Args:
        backbone: Settings with `_target_`, as in conf/backbone/efficientnet_lite0.yaml.
        device: Where to compute.
        cache_dir: Folder of the cache; None for no cache, and batches as small as they are given.

    Attributes:
        network: The backbone.
        inputs: Shape of the network's inputs.
        tensors: Its weights and population statistics.

    Raises:
        UserError: If weights cannot be read, or the network has no preprocessing of its own.
    """

    def __init__(
        self, backbone: dict[str, Any], device: torch.device, cache_dir: Path | None
    ) -> None:
        network = components.make(backbone, "backbone")
        if not isinstance(network, Pretrained):
            raise UserError(f"backbone={type(network).__name__}: should be a pretrained network")
        self.network, self._device, self._cache_dir = network, device, cache_dir
        self.inputs = InputSpec((3, network.preprocessing.size, network.preprocessing.size))
        self._params, self._population = network.init(self.inputs, prng.key_of(0, device=device))
        self.tensors = self._params | self._population
        self._key = feature_cache.network_key(network, self.tensors, device, "fp32")
        self._params = channels_last(self._params)

    def features(self, x: Tensor) -> Tensor:
        """Compute features [B, D] of images in [0, 1], float32 [B, 3, size, size]."""
        return self.network.embed(self._params, channels_last(x), self._population)[0]

    def __call__(
        self,
        images: Sequence[Image.Image | str | Path],
        progress: Callable[[int, int], object] | None = None,
        unreadable: dict[int, str] | None = None,
    ) -> Tensor:
        """Embed images.

        Args:
            images: Files of any format and size, or PIL images, [M].
            progress: Called with the numbers of images done and of all.
            unreadable: Gets the reason for each image that cannot be read, by its index; its
                features are NaN. None: the first one is an error.

        Returns:
            Features, float32 [M, D], on the CPU.

        Raises:
            UserError: If images cannot be read, or the cache cannot be written.
        """
        failures: dict[int, str] = {}

        def read(index: int, how: Callable[[Any], Any], otherwise: Any) -> Any:
            """Apply a function to an image, or record why that is impossible."""
            image = images[index]
            try:
                return how(image if isinstance(image, Image.Image) else Path(image).expanduser())
            except Exception as error:  # a corrupt file can raise any exception in Pillow
                if is_out_of_memory(error):
                    raise
                failures[index] = first_line(error)
            if unreadable is None:
                name = f"image {index}" if isinstance(image, Image.Image) else image
                raise UserError(f"{name} is not a readable image ({failures[index]})")
            return otherwise

        def load(indices: list[int]) -> Tensor:
            black = torch.zeros(self.inputs.shape)
            pixels = [read(index, self._pixels, black) for index in indices]
            return torch.stack(pixels).to(self._device)

        keys = [read(index, _content_key, b"") for index in range(len(images))]
        size, folder = math.prod(self.network.shape(self.inputs)), self._cache_dir
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
        return torch.stack([self._pixels(image) for image in images]).to(self._device)

    def _pixels(self, image: Image.Image | Path) -> Tensor:
        """Return an image as the network's input in [0, 1], [3, size, size]."""
        if isinstance(image, Path):
            with open_image(image) as opened:
                return self._pixels(opened)
        array = np.asarray(self.network.preprocessing.crop(plain(image, "white", "RGB")))
        return torch.from_numpy(array.copy()).permute(2, 0, 1) / 255


def _content_key(image: Image.Image | Path) -> bytes:
    if isinstance(image, Path):
        return digest(image.read_bytes())
    return digest(repr((image.mode, image.size)).encode(), image.convert("RGBA").tobytes())
