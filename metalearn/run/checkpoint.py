"""Checkpoints: tensors and plain data with a checksum, written so that one is always intact."""

import hashlib
import io
import json
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metalearn.report.folder import RunFolder
from metalearn.system.atomic import atomic_writer, make_folder
from metalearn.system.errors import UserError, is_out_of_memory
from metalearn.system.reading import check_limits, check_types, parse_json, read_bytes
from metalearn.tasks.types import Params, State

#: Largest checkpoint that is read, in bytes.
_MAX_BYTES = 16 << 30
#: Parts of the state.
_PARTS = ("meta", "fixed")
#: Shift and scale of each channel, as `check_types` takes it.
STANDARDISATION = {"shift?": [float], "scale?": [float]}


class CorruptCheckpoint(UserError):
    """A checkpoint that is corrupt, foreign, or does not match its checksum."""


def save(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Write a checkpoint with its checksum, atomically; move an older one to `previous`."""
    make_folder(path.parent)
    with atomic_writer(path, previous) as stream:
        torch.save(content | {"checksum": _checksum(content)}, stream)


def save_model(path: Path, content: dict[str, Any]) -> None:
    """Write the content of a checkpoint as safetensors: tensors, and the rest as JSON."""
    from safetensors.torch import save as serialised

    # In an order that depends on names only: the checksum depends on it.
    parts = {part: dict(sorted(content[part].items())) for part in _PARTS}
    rest = {key: value for key, value in sorted(content.items()) if key not in _PARTS}
    rest["checksum"] = _checksum(rest | parts)
    tensors = {
        f"{part} {name}": x.contiguous() for part in _PARTS for name, x in parts[part].items()
    }
    with atomic_writer(path) as stream:
        stream.write(serialised(tensors, {"metalearn": json.dumps(rest)}))


def _read_model(data: bytes, device: torch.device) -> dict[str, Any]:
    from safetensors.torch import load as tensors_of

    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")].decode())
    content = parse_json(header["__metadata__"]["metalearn"]) | {part: {} for part in _PARTS}
    for key, value in sorted(tensors_of(data).items()):
        part, _, name = key.partition(" ")
        content[part][name] = value.to(device)
    return dict(content)


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint, or a model as safetensors, without executing code from it.

    Raise UserError if the file is missing, corrupt or foreign, or does not match its checksum.
    """
    data = read_bytes(path, _MAX_BYTES)
    try:
        content = _read_model(data, device) if data[8:9] == b"{" else _read_archive(data, device)
        _check_content(content, 8 * len(data))
    except Exception as error:  # a corrupt file can raise anything
        if is_out_of_memory(error):
            raise
        raise CorruptCheckpoint(
            f"{path} is not a readable checkpoint ({type(error).__name__})"
        ) from None
    if not isinstance(content, dict) or not all(
        isinstance(content.get(part), dict)
        and all(isinstance(value, Tensor) for value in content[part].values())
        for part in _PARTS
    ):
        raise CorruptCheckpoint(f"{path} is not a checkpoint of metalearn")
    checksum = content.pop("checksum", None)  # runs of early versions have none
    if checksum is not None and checksum != _checksum(content):
        raise CorruptCheckpoint(f"{path} is corrupt: its content does not match its checksum")
    return content


def _read_archive(data: bytes, device: torch.device) -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(one.file_size for one in archive.infolist()) > len(data):
            raise ValueError("it is compressed")  # it may expand to any size
    with warnings.catch_warnings():  # about what no checkpoint holds
        warnings.simplefilter("ignore")
        return torch.load(io.BytesIO(data), map_location=device, weights_only=True)


def inputs(path: Path) -> tuple[tuple[int, ...] | None, dict[str, list[float]] | None]:
    """Return shape and standardisation of the inputs that a run was trained on; None if unknown.

    Raise UserError if the checkpoint does not describe them as it should.
    """
    content = load(path, torch.device("cpu"))
    try:
        check_types(content, {"spec?": {"input_shape": [int]}, "standardisation?": STANDARDISATION})
    except ValueError as error:
        raise UserError(f"{path} does not describe its inputs ({error})") from None
    shape = content["spec"]["input_shape"] if "spec" in content else None
    return None if shape is None else tuple(shape), content.get("standardisation")


def latest(files: RunFolder, tell: Callable[[str], None]) -> dict[str, Any] | None:
    """Return the last intact checkpoint of a run, on the CPU, or None if there is none.

    A corrupt one is renamed to `damaged-….pt`, and `tell` gets a line. Raise UserError if all are
    corrupt, or one cannot be read.
    """
    damaged: list[Path] = []
    for path in (files.last, files.previous):
        if not path.exists():
            continue
        try:
            content = load(path, torch.device("cpu"))
        except CorruptCheckpoint as error:
            damaged.append(path)
            tell(f"{error}; using the previous checkpoint")
            continue
        for other in damaged:
            os.replace(other, other.with_name(f"damaged-{other.name}"))
        return content
    if damaged:
        raise UserError(
            f"{files.path}: no checkpoint is intact; to start again, remove the run folder"
        )
    return None


def _check_content(content: Any, most_bytes: int) -> None:
    """Raise ValueError for types that a checkpoint does not have, or more values or bytes."""
    sizes = [0]

    def check(value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            sizes.append(sizes[-1] + value.numel() * value.element_size())
            is_known = value.layout == torch.strided and value.device.type != "meta"
        else:
            keys = {type(key) for key in value} if isinstance(value, dict) else set()
            is_known = isinstance(value, dict | list | tuple | str | int | float | None)
            is_known = is_known and keys <= {str, int}
        if not is_known or sizes[-1] > most_bytes:
            raise ValueError(f"{name} is not what a checkpoint holds")

    check_limits(content, 1e6, check)


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


def parts_of(state: State) -> dict[str, Params]:
    """Return the parts of a state by their names in a checkpoint."""
    return dict(zip(_PARTS, state, strict=True))


def shapes(tensors: Params) -> dict[str, torch.Size]:
    """Return the shapes of tensors."""
    return {name: value.shape for name, value in tensors.items()}


def state(content: dict[str, Any], expected: State, folder: Path) -> State:
    """Return the state in a checkpoint; raise UserError for other names or shapes than expected."""
    for part, own in parts_of(expected).items():
        stored = content[part]
        if missing := sorted(own.keys() - stored.keys()):
            raise UserError(
                f"{folder}: its checkpoint has no {missing[0]}; another version or method wrote it"
            )
        if shapes(own) != shapes(stored):
            raise UserError(
                f"{folder}: its weights do not fit this configuration; change only the test's "
                "protocol"
            )
    return State(content["meta"], content["fixed"])


def start_from(folder: Path, own: State, device: torch.device) -> State:
    """Return a state with the best weights of a run, where names and shapes agree.

    Raise UserError if those of the backbone do not.
    """
    content = load(RunFolder(folder).best, device)
    taken = [
        {
            name: stored[name].to(value.dtype)
            for name, value in part.items()
            if name in stored and stored[name].shape == value.shape
        }
        for part, stored in zip(own, (content["meta"], content["fixed"]), strict=True)
    ]
    missing = [name for name in own.params if name.startswith("net.") and name not in taken[0]]
    if missing:
        raise UserError(
            f"train.start={folder}: its run has no {missing[0]} of the shape "
            f"{tuple(own.params[missing[0]].shape)}; choose a run with the same backbone"
        )
    return State(*({**part, **new} for part, new in zip(own, taken, strict=True)))
