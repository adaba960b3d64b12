"""Checkpoints: tensors and plain data only, each with a checksum, written so that one is always whole."""

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metalearn.system.atomic import replacing
from metalearn.system.errors import UserError, ran_out
from metalearn.tasks.types import State

BEST, LAST, PREVIOUS = "best.pt", "last.pt", "previous.pt"


class Damaged(UserError):
    """A checkpoint that is torn, foreign, or not what its checksum says."""


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
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    try:
        found = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except Exception as error:  # torch lets through whatever the bytes of a damaged file lead to
        if ran_out(error):
            raise
        raise Damaged(f"{path} is not a readable checkpoint ({type(error).__name__})") from None
    if not isinstance(found, dict) or not all(
        isinstance(found.get(part), dict) for part in ("meta", "fixed")
    ):
        raise Damaged(f"{path} is no checkpoint of metalearn")
    checksum = found.pop("checksum", None)
    if checksum is not None and checksum != _checksum(found):  # runs of early versions have none
        raise Damaged(f"{path} is damaged: its content is not what its checksum says")
    return found


def latest(folder: Path, tell: Callable[[str], None]) -> dict[str, Any] | None:
    """The last whole checkpoint of a run, on the CPU; None where there has been none.

    A damaged one goes out of the way, to `damaged-….pt`, and `tell` gets a line.
    Raises: UserError where there are some and none is whole, or where one cannot be read just now.
    """
    damaged: list[str] = []
    for name in (LAST, PREVIOUS):
        if not (folder / name).exists():
            continue
        try:
            found = load(folder / name, torch.device("cpu"))
        except Damaged as error:
            damaged.append(name)
            tell(f"{error}; going back to the one before")
            continue
        for other in damaged:
            os.replace(folder / other, folder / f"damaged-{other}")
        return found
    if damaged:
        raise UserError(
            f"{folder}: no checkpoint there is whole; to begin afresh, remove the run's folder"
        )
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


def state(kept: dict[str, Any], wanted: State, folder: Path) -> State:
    """The state in a checkpoint of the run in `folder`. Raises: UserError when its weights are not named and shaped as wanted."""
    for part, own in zip(("meta", "fixed"), wanted, strict=True):
        found = kept[part]
        if missing := sorted(own.keys() - found.keys()):
            raise UserError(
                f"{folder}: its checkpoint has no {missing[0]}; it was made by another version or method"
            )
        if {name: value.shape for name, value in own.items()} != {
            name: value.shape for name, value in found.items()
        }:
            raise UserError(
                f"{folder}: its weights do not fit this configuration; change only the test's protocol"
            )
    return State(kept["meta"], kept["fixed"])
