"""Features on disk: inputs embedded in batches, found again by content and network.

A killed process leaves no broken cache, and several can use it at once.
"""

import contextlib
import dataclasses
import hashlib
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metalearn.backbones.base import Backbone
from metalearn.system.errors import UserError, first_line
from metalearn.tasks.types import Params

#: Inputs embedded at once. It never varies, so that features do not depend on what is cached.
BATCH = 32


def embed_inputs(
    keys: list[bytes],
    load: Callable[[list[int]], Tensor],
    network: Callable[[Tensor], Tensor],
    size: int,
    cache: "FeatureCache | None",
    progress: Callable[[int, int], object] | None,
    failures: Mapping[int, str] = {},
    is_padded: bool = True,
) -> Tensor:
    """Embed inputs in batches, all of the same size; return float32 [M, D] on the CPU.

    Args:
        keys: Key of the content of each input, [M].
        load: Returns the inputs of these indices, [B, *X].
        network: Inputs to features [B, D].
        size: D.
        cache: Where to look first, and to store.
        progress: Called with the numbers of inputs done and of all.
        failures: Inputs that cannot be loaded, which are not stored; `load` may add some.
        is_padded: False for smaller batches: a single input takes a tenth of the time, but its
            features depend on the size of its batch, by rounding.
    """
    z = torch.zeros(len(keys), size)
    missing = list(range(len(keys))) if cache is None else cache.read(keys, z)
    missing = [index for index in missing if index not in failures]
    for start in range(0, len(missing), BATCH):
        chunk = missing[start : start + BATCH]
        padded = chunk + chunk[-1:] * (BATCH - len(chunk)) * is_padded
        z[chunk] = network(load(padded))[: len(chunk)].float().cpu()
        if cache is not None:
            cache.write([(keys[index], z[index]) for index in chunk if index not in failures])
        if progress is not None:
            progress(len(keys) - len(missing) + start + len(chunk), len(keys))
    return z


def digest(*parts: Any) -> bytes:
    """Return 16 bytes that tell contents apart."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part)
    return hashed.digest()[:16]


def network_key(backbone: Backbone, tensors: Params, device: torch.device, precision: str) -> str:
    """Return a hash of everything that features depend on except for the input."""
    names = [
        field.name for field in dataclasses.fields(backbone) if "runtime" not in field.metadata
    ]
    own = [(name, getattr(backbone, name)) for name in names if name not in ("weights", "frozen")]
    preprocessing = getattr(backbone, "preprocessing", None)
    settings = (BATCH, type(backbone).__name__, own, preprocessing, device.type, precision)
    parts: list[Any] = [repr((*settings, torch.__version__)).encode()]
    for name, value in sorted(tensors.items()):
        parts += [name.encode(), value.detach().cpu().contiguous().numpy()]
    return digest(*parts).hex()


class FeatureCache:
    """Features by the content of their inputs, in a database that survives a kill at any time."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def read(self, keys: list[bytes], z: Tensor) -> list[int]:
        """Write the stored features to their rows of z [M, D]; return the other rows."""
        missing = []
        for index, key in enumerate(keys):
            rows = self._connection.execute("SELECT value FROM features WHERE key = ?", (key,))
            if (row := rows.fetchone()) is None:
                missing.append(index)
            else:
                z[index] = torch.frombuffer(bytearray(row[0]), dtype=torch.float32)
        return missing

    def write(self, rows: list[tuple[bytes, Tensor]]) -> None:
        """Store features [D] by key, all or none."""
        values = [(key, value.numpy().tobytes()) for key, value in rows]
        with self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO features VALUES (?, ?)", values)


@contextlib.contextmanager
def opened(cache_dir: Path, name: str) -> Iterator[FeatureCache]:
    """Open the cache of a network; raise UserError if that is impossible."""
    path = cache_dir / f"features-{name}.sqlite"
    hint = f"cache_dir={cache_dir} cannot be written"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(_connected(path)) as connection:
            yield FeatureCache(connection)
    except sqlite3.OperationalError as error:
        raise UserError(f"{hint} ({first_line(error)}); choose another folder") from None
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path} is corrupt ({first_line(error)}); remove it") from None
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{hint} ({error.strerror}); choose another folder") from None


def _connected(path: Path) -> sqlite3.Connection:
    create = "CREATE TABLE IF NOT EXISTS features (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID"
    connection = sqlite3.connect(path, timeout=60)
    try:
        connection.execute(create)
    except sqlite3.DatabaseError as error:
        connection.close()
        if isinstance(error, sqlite3.OperationalError):
            raise
        print(f"{path} is corrupt; rebuilding it", file=sys.stderr)
        path.unlink()
        return _connected(path)
    return connection
