"""Checkpoints: tensors and plain data only, written atomically."""

import pickle
from pathlib import Path
from typing import Any

import torch

from metalearn.atomic import replacing
from metalearn.errors import UserError


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint; a reader never sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as stream:
        torch.save(content, stream)


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """Reads a checkpoint without running any code in it. Raises: UserError for a missing or foreign file."""
    try:
        found = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is not a readable checkpoint ({type(error).__name__})") from None
    if not isinstance(found, dict) or not {"meta", "fixed"} <= found.keys():
        raise UserError(f"{path} is no checkpoint of metalearn")
    return found
