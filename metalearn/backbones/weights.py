"""Read and download pretrained weights: tensors only, never code."""

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metalearn.system.download import run_download
from metalearn.system.errors import UserError, first_line

#: What to do without a network.
OFFLINE = "download it yourself and set backbone.weights=<file>"


def download(url: str) -> Path:
    """Return a file in torch's hub folder; download it if it is not there.

    If its name ends with the first digits of its SHA-256, as torchvision's do, they are verified.
    Raise UserError without a network, or for a wrong checksum.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.exists():
        digits = re.search(r"-([0-9a-f]{8,})$", path.stem)
        checksum = digits and digits[1]
        run_download(
            url,
            path.parent,
            lambda: torch.hub.download_url_to_file(url, str(path), checksum, progress=False),
            OFFLINE,
        )
    return path


def read(path: Path, unique: str, network: str) -> dict[str, Any]:
    """Read a state dict of a network, safetensors or saved by torch; raise UserError otherwise.

    It may be inside "state_dict" or "model", and all names may have a prefix such as "module.".
    `unique` is a name in it.
    """
    where = f"backbone.weights={path}"
    what = f"should be a state dict of {network}, saved with torch.save(model.state_dict(), …)"
    try:
        if path.exists() and not path.is_file():  # to read a pipe or a device may never end
            raise ValueError("not a file")
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{where}: contains other objects than tensors, such as a module, or is corrupt; {what}"
        ) from None
    except Exception as error:  # a corrupt file can raise any exception
        raise UserError(
            f"{where}: not a readable weights file ({first_line(error)}); {what}"
        ) from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"{where}: {what}")
    names = [name for name in map(str, content) if f".{name}".endswith(f".{unique}")]
    prefix = min(names, key=len, default=unique).removesuffix(unique)
    return {str(name).removeprefix(prefix): value for name, value in content.items()}


def load(path: Path, tensors: dict[str, Tensor], network: str) -> dict[str, Tensor]:
    """Return the tensors of a file in the place of those of a network."""
    stored = read(path, max(tensors, key=len), network)
    return {name: tensor(stored, name, like, str(path), network) for name, like in tensors.items()}


def tensor(
    state_dict: dict[str, Any], name: str, like: Tensor, weights: str | None, network: str
) -> Tensor:
    """Return a tensor of a state dict, with the shape, dtype and device of `like`.

    Raise UserError, with `weights` and `network`, if it is missing or has a different shape.
    """
    value = state_dict.get(name)
    if not isinstance(value, Tensor) or value.shape != like.shape:
        problem = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "missing"
        raise UserError(
            f"backbone.weights={weights}: {name} is {problem}; should be a state dict of {network}"
        )
    return value.to(like)
