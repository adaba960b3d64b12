"""Checkpoints: tensors and plain data only, each with a checksum, written so that one is always whole."""

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metalearn.atomic import replacing
from metalearn.errors import UserError

BEST, LAST, PREVIOUS = "best.pt", "last.pt", "previous.pt"


def save(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Writes a checkpoint with its checksum; a reader never sees half of one.

    Args: previous: where the checkpoint that `path` held goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, previous) as stream:
        torch.save(content | {"checksum": _checksum(content)}, stream)


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """Reads a checkpoint without running any code in it.

    Raises: UserError for a file that is missing, torn, foreign, or not what its checksum says.
    """
    try:
        found = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is not a readable checkpoint ({type(error).__name__})") from None
    if not isinstance(found, dict) or not {"meta", "fixed"} <= found.keys():
        raise UserError(f"{path} is no checkpoint of metalearn")
    checksum = found.pop("checksum", None)
    if checksum is not None and checksum != _checksum(found):  # runs of early versions have none
        raise UserError(f"{path} is damaged: its content is not what its checksum says")
    return found


def latest(folder: Path, device: torch.device, tell: Callable[[str], None]) -> dict[str, Any] | None:
    """The last checkpoint of a run that can be read, or None; `tell` gets a line for each that is there and cannot."""
    for name in (LAST, PREVIOUS):
        if (folder / name).exists():
            try:
                return load(folder / name, device)
            except UserError as error:
                tell(f"{error}; going back to the one before")
    return None


def _checksum(content: Any) -> str:
    digest = hashlib.sha256()

    def feed(node: Any) -> None:
        if isinstance(node, Tensor):
            digest.update(f"{node.dtype}{tuple(node.shape)}".encode())
            digest.update(node.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        elif isinstance(node, dict):
            for key, value in node.items():
                digest.update(repr(key).encode())
                feed(value)
        elif isinstance(node, list | tuple):
            digest.update(str(len(node)).encode())
            for value in node:
                feed(value)
        else:
            digest.update(repr(node).encode())

    feed(content)
    return digest.hexdigest()
