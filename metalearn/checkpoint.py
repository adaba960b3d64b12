"""Checkpoints: tensors and plain data only, written atomically."""

import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch

from metalearn.errors import UserError


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes to a temporary file, flushes it to disk, and renames: a reader never sees half a checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(stream.name, path)


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """Reads a checkpoint without running any code in it. Raises: UserError for a missing or foreign file."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is not a readable checkpoint ({type(error).__name__})") from None
