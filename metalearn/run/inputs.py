"""Read images, texts and arrays as the inputs of a trained run."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from metalearn.backbones.base import Backbone
from metalearn.data.files import list_images, open_image
from metalearn.data.images import with_channels
from metalearn.system.errors import UserError, first_line
from metalearn.tasks.types import Spec, Tokenizer


class Reader:
    """Converts what users have to the inputs of a run, as the run's dataset reads its own."""

    def __init__(
        self,
        spec: Spec,
        dataset: Any,  # an ImageDataset, if it reads image files
        backbone: Backbone,
        standardisation: dict[str, list[float]],
        device: torch.device,
    ) -> None:
        self.spec, self.device = spec, device
        self._dataset, self._backbone = dataset, backbone
        self._standardisation = standardisation

    @property
    def pen(self) -> float | None:
        """Return `ImageDataset.pen` of the run's dataset."""
        return getattr(self._dataset, "pen", None)

    @staticmethod
    def files(folder: str | Path) -> list[Path]:
        """Return the images in a folder and its subfolders, in the order of their predictions."""
        folder = Path(folder).expanduser()
        files = [folder / image.name for image in list_images(folder)] if folder.is_dir() else []
        if not files:
            raise UserError(f"{folder} is not a folder with images")
        return files

    def inputs(self, x: Any) -> Tensor:
        """Convert inputs to the network's, [M, *X].

        Args:
            x: Image files, a folder (see `files`) or PIL images, which are read as the run's
                dataset reads its own; or an array, tensor or nested list: images [M, C, H, W], grey
                or in colour, uint8 or floats in [0, 1] (for handwriting, ink is 1); feature vectors
                [M, D]; texts, or tokens [M, L].

        Raises:
            UserError: For inputs that the run does not accept, or a file that is not an image.
        """
        return self._standardised(self._raw(x))

    def _raw(self, x: Any) -> Tensor:
        """Convert inputs as `inputs` does, but do not normalise them."""
        items = self._items(x)
        kind, vocabulary = self.spec.inputs.kind, self.spec.vocabulary or 0
        if len(items) == 0:
            items = torch.zeros(0, *self.spec.input_shape)
        elif kind == "tokens" and all(isinstance(item, str) for item in items):
            items = self._tokens(items)
        elif all(isinstance(item, str | Path | Image.Image) for item in items):
            items = torch.stack([self.read_image(item) for item in items])
        try:
            inputs = torch.as_tensor(items)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"x is neither an array of numbers nor a list of images ({first_line(error)})"
            ) from None
        if kind == "images" and inputs.dtype == torch.uint8:
            inputs = inputs / 255
        if kind == "images" and inputs.ndim == 4:
            inputs = with_channels(inputs, self.spec.input_shape[0])
        if inputs.shape[1:] != self.spec.input_shape:
            shape = ", ".join(map(str, self.spec.input_shape))
            raise UserError(f"x has shape {tuple(inputs.shape)}; this run requires [M, {shape}]")
        inputs = inputs.to(self.device, torch.int64 if kind == "tokens" else torch.float32)
        if not inputs.isfinite().all():
            raise UserError("x has values that are not finite")
        low, high = inputs.aminmax() if len(inputs) else (0, 0)
        if kind == "tokens" and not 0 <= low <= high < vocabulary:
            raise UserError(f"x has tokens outside 0 to {vocabulary - 1}, the run's vocabulary")
        if kind == "images" and not 0 <= low <= high <= 1:
            raise UserError(
                "x has values outside [0, 1]; give images as uint8, or as floats in [0, 1]"
            )
        return inputs

    def _standardised(self, inputs: Tensor) -> Tensor:
        if not self._standardisation:
            return inputs
        shape = -1, *[1] * (inputs.ndim - 2)
        shift, scale = (
            torch.tensor(self._standardisation[name], device=self.device).view(shape)
            for name in ("shift", "scale")
        )
        return (inputs - shift) * scale

    def _tokens(self, texts: Sequence[str]) -> Tensor:
        """Return tokens [M, L] of texts, cut or padded to the run's length."""
        if self._tokenizer is None:
            raise UserError("x has texts, but this run's inputs are tokens of its own data")
        length = self.spec.input_shape[0]
        tokens = self._tokenizer(texts)[:, :length]
        return torch.nn.functional.pad(tokens, (0, length - tokens.shape[1]))

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer | None:
        return self._backbone.tokenizer()

    def _items(self, x: Any) -> Any:
        """Return inputs as something with a length that can be sliced."""
        if self.spec.inputs.kind == "tokens" and isinstance(x, str):
            return [x]
        if isinstance(x, str | Path) and Path(x).expanduser().is_dir():
            return self.files(x)
        if isinstance(x, str | Path | Image.Image):
            return [x]
        return x if hasattr(x, "__len__") else list(x)  # a generator, e.g. of Path.glob

    def read_image(self, image: str | Path | Image.Image) -> Tensor:
        """Read an image as `read` does; raise UserError also if it is not an image."""
        try:
            return self.read(image)
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{image} is not a readable image ({first_line(error)})") from None

    def read(self, item: str | Path | Image.Image) -> Tensor:
        """Read an image, uint8 [C, H, W], or a text: its tokens, int64 [L].

        Raises:
            UserError: If the run's dataset reads none.
            Exception: As Pillow does, for an image that cannot be read.
        """
        if isinstance(item, str) and self.spec.inputs.kind == "tokens":
            return self._tokens([item])[0]
        if not self._dataset.reads_image_files:
            raise UserError(f"{item}: this run's dataset does not read images")
        if isinstance(item, str | Path):
            with open_image(Path(item).expanduser()) as opened:
                return self.read(opened)
        return torch.from_numpy(self._dataset.to_array(item).copy())
