"""Embed each input once: for tests, for training with a frozen backbone, and for prediction.

Where an embedding depends on its input alone, episodes gather features instead of images. Features
of frozen networks are cached on disk, by the content of the input and by the network.
"""

import contextlib
import dataclasses
import hashlib
import math
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metalearn.algorithms.base import Algorithm
from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.gradient import GradientAdaptation
from metalearn.algorithms.linear_head import LinearHeadAlgorithm
from metalearn.algorithms.params import select
from metalearn.backbones.base import Backbone
from metalearn.backbones.normalisation import Normaliser
from metalearn.backbones.pretrained import Pretrained
from metalearn.config import components
from metalearn.data.files import open_image, plain
from metalearn.engine import Engine, channels_last
from metalearn.report.progress import Listener
from metalearn.run.build import Run
from metalearn.run.parts import cache_folder
from metalearn.system.errors import UserError, first_line, is_out_of_memory
from metalearn.tasks import prng
from metalearn.tasks.sampling import BatchSampler, EpisodeSampler, TaskSource
from metalearn.tasks.store import ArrayStore, Augmented
from metalearn.tasks.types import Batch, InputSpec, Params, State

#: Inputs embedded at once. It never varies, so that features do not depend on what is cached.
_BATCH = 32
#: Largest size of the features of a split in memory.
_MAX_BYTES = 2**30


def embed(
    images: Sequence[Image.Image | str | Path],
    backbone: dict[str, Any],
    device: torch.device,
    cache_dir: Path,
    progress: Callable[[int, int], object] | None = None,
    unreadable: dict[int, str] | None = None,
) -> Tensor:
    """Embed images with a pretrained network and its own preprocessing; cached on disk.

    Args:
        images: Files of any format and size, or PIL images, [M].
        backbone: Settings with `_target_`, as in conf/backbone/efficientnet_lite0.yaml.
        device: Where to compute.
        cache_dir: Folder of the cache.
        progress: Called with the numbers of images done and of all.
        unreadable: Gets the reason for each image that cannot be read, by its index; its features
            are NaN. None: the first one is an error.

    Returns:
        Features, float32 [M, D], on the CPU.

    Raises:
        UserError: If weights or images cannot be read, the cache cannot be written, or the network
            has no preprocessing of its own.
    """
    network = components.make(backbone, "backbone")
    if not isinstance(network, Pretrained):
        raise UserError(f"backbone={type(network).__name__}: should be a pretrained network")
    inputs = InputSpec((3, network.preprocessing.size, network.preprocessing.size))
    params, population = channels_last(network.init(inputs, prng.key_of(0, device=device)))
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
        black = torch.zeros(inputs.shape)
        pixels = [read(index, lambda one: _pixels(one, network), black) for index in indices]
        return torch.stack(pixels).to(device)

    keys = [read(index, _image_key, b"") for index in range(len(images))]
    name = _network_key(network, params | population, device, "fp32")
    with _opened(cache_dir, name) as cache, torch.no_grad():
        z = _embed(
            keys,
            load,
            lambda x: network.embed(params, channels_last(x), population)[0],
            math.prod(network.shape(inputs)),
            cache,
            progress,
            failures,
        )
    z[list(failures)] = torch.nan
    if unreadable is not None:
        unreadable.update(failures)
    return z


def _image_key(image: Image.Image | Path) -> bytes:
    if isinstance(image, Path):
        return _digest(image.read_bytes())
    return _digest(repr((image.mode, image.size)).encode(), image.convert("RGBA").tobytes())


def _pixels(image: Image.Image | Path, network: Pretrained) -> Tensor:
    """Return an image as the network's input in [0, 1], [3, size, size]."""
    if isinstance(image, Path):
        with open_image(image) as opened:
            return _pixels(opened, network)
    array = np.asarray(network.preprocessing.crop(plain(image, "white", "RGB")))
    return torch.from_numpy(array.copy()).permute(2, 0, 1) / 255


def embeds_alone(algorithm: Algorithm) -> bool:
    """Return True if tests use inputs only through embeddings that depend on nothing else.

    A method that overrides how its base class uses inputs does not count.
    """

    def is_own(base: type, *names: str) -> bool:
        cls = type(algorithm)
        return issubclass(cls, base) and all(getattr(cls, n) is getattr(base, n) for n in names)

    backbone = algorithm.backbone
    is_independent = algorithm.normalisation.has_population or not backbone.normalises
    if is_own(EmbeddingAlgorithm, "adapt", "forward", "loss"):
        return is_independent
    if not is_own(LinearHeadAlgorithm, "embed", "adapted", "forward"):
        return False
    if isinstance(algorithm, GradientAdaptation):
        if not is_own(GradientAdaptation, "at_step"):  # weights of the backbone for each step
            return False
        if algorithm.embeds_once and not backbone.normalises:
            return True
    return backbone.is_frozen and is_independent


def with_features(
    run: Run,
    engine: Engine,
    source: TaskSource,
    state: State,
    parts: list[tuple[int, int]],
    listener: Listener,
) -> tuple[Engine, TaskSource]:
    """Return engine and source for tasks of features, or the given ones if that is impossible.

    Only the inputs of the tasks that will be drawn are embedded: parts of (first, count).
    """
    if not isinstance(source, EpisodeSampler) or not _is_possible(run, engine, source):
        return engine, source
    size = len(source.store)
    numbers = torch.arange(4 * size, device=source.key.device)  # rotated inputs are extra rows
    drawn = dataclasses.replace(source, store=_Rows(numbers, size=size, position=numbers))
    rows = []
    for part in parts:
        task = drawn.draw(*part)
        examples = (task.support.x, task.query.x, task.support.unlabelled)
        rows.append(torch.cat([x.flatten() for x in examples if x is not None]).unique())
    return _on_features(run, engine, source, state, torch.cat(rows).unique(), listener)


def for_training(run: Run, state: State, listener: Listener) -> Run:
    """Return a run that trains on features, if its backbone is frozen and that saves work."""
    engine, source, train = run.train_engine, run.train, run.config.train
    if not (
        engine.algorithm.backbone.is_frozen
        and isinstance(source, EpisodeSampler | BatchSampler)
        and _is_possible(run, engine, source)
    ):
        return run
    rows = source.view.index.rows.unique()
    if source.view.has_rotations:
        rows = torch.cat([rows + len(source.store) * turn for turn in range(4)])
    first = source.draw(0, 1)
    each = (first.x if isinstance(first, Batch) else first.query.x).shape[1]
    if len(rows) > train.steps * train.meta_batch * each:
        return run
    engine, source = _on_features(run, engine, source, state, rows, listener)
    return dataclasses.replace(run, train=source, train_engine=engine)


def _is_possible(run: Run, engine: Engine, source: EpisodeSampler | BatchSampler) -> bool:
    return (
        run.config.engine.features
        and embeds_alone(engine.algorithm)
        and source.store.spec.kind != "features"
        and not isinstance(source.store, Augmented)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Identity(Backbone):
    """The identity, in the place of the backbone that computed the features."""

    input_kinds: ClassVar[tuple[str, ...]] = ("features",)

    of: Backbone
    inputs: InputSpec

    @property
    def normalises(self) -> bool:
        return self.of.normalises

    @property
    def is_frozen(self) -> bool:
        return True

    def shape(self, inputs: InputSpec) -> tuple[int, ...]:
        return self.of.shape(self.inputs)

    def forward(self, params: Params, x: Tensor, norm: Normaliser, key: Tensor | None) -> Tensor:
        assert norm.film is None and not norm.collect
        return x


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows(ArrayStore):
    """Values [M, *X] of some rows of a store with `size` inputs.

    position: int64 [R], the index in `values` of each row.
    """

    size: int
    position: Tensor

    def __len__(self) -> int:
        return self.size

    def load(self, rows: Tensor) -> Tensor:
        return self.values[self.position[rows]]


def _on_features(
    run: Run, engine: Engine, source: Any, state: State, rows: Tensor, listener: Listener
) -> tuple[Engine, Any]:
    """Embed rows of a source, int64 [M]; return the engine and the source of their features.

    If these need too much memory, engine and source are returned as they are.
    """
    backbone, store = engine.algorithm.backbone, source.store
    size = math.prod(backbone.shape(store.spec))
    if (required := 4 * len(rows) * size) > _MAX_BYTES:
        listener.note(
            f"features of {len(rows):,} inputs need {required / 2**30:.1f} GiB: too much to embed "
            "each only once"
        )
        return engine, source
    tensors = channels_last(select(state.params, "net"))
    given = select(state.buffers, "net")

    def load(indices: list[int]) -> Tensor:
        x: Tensor = store.normalise(store.load(rows[indices]))
        return x

    def network(x: Tensor) -> Tensor:
        with engine.autocast(x.device):
            return backbone.embed(tensors, channels_last(x), given or None)[0]

    keys = [b""] * len(rows)
    cache: contextlib.AbstractContextManager[sqlite3.Connection | None] = contextlib.nullcontext()
    if backbone.is_frozen:  # the weights of others are of this run only
        for at in range(0, len(rows), _BATCH):
            chunk = load(list(range(at, min(at + _BATCH, len(rows))))).cpu().contiguous()
            keys[at : at + _BATCH] = [_digest(x.numpy()) for x in chunk]
        name = _network_key(backbone, tensors | given, rows.device, engine.precision)
        cache = _opened(cache_folder(run.config), name)
    with cache as opened, torch.no_grad():
        values = _embed(keys, load, network, size, opened, listener.embedding).to(rows.device)
    position = torch.zeros(int(rows.max()) + 1, dtype=torch.int64, device=rows.device)
    position[rows] = torch.arange(len(rows), device=rows.device)
    features = _Rows(values, size=len(store), position=position)
    algorithm = dataclasses.replace(
        engine.algorithm, backbone=_Identity(of=backbone, inputs=store.spec)
    )
    return (
        dataclasses.replace(engine, algorithm=algorithm),
        dataclasses.replace(source, store=features),
    )


def _embed(
    keys: list[bytes],
    load: Callable[[list[int]], Tensor],
    network: Callable[[Tensor], Tensor],
    size: int,
    cache: sqlite3.Connection | None,
    progress: Callable[[int, int], object] | None,
    failures: Mapping[int, str] = {},
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
    """
    z = torch.zeros(len(keys), size)
    missing = []
    for index, key in enumerate(keys):
        found = cache and cache.execute("SELECT value FROM features WHERE key = ?", (key,))
        if row := found and found.fetchone():
            z[index] = torch.frombuffer(bytearray(row[0]), dtype=torch.float32)
        elif index not in failures:
            missing.append(index)
    for start in range(0, len(missing), _BATCH):
        chunk = missing[start : start + _BATCH]
        padded = chunk + chunk[-1:] * (_BATCH - len(chunk))
        z[chunk] = network(load(padded))[: len(chunk)].float().cpu()
        if cache is not None:
            stored = [(keys[i], z[i].numpy().tobytes()) for i in chunk if i not in failures]
            with cache:  # all or none
                cache.executemany("INSERT OR REPLACE INTO features VALUES (?, ?)", stored)
        if progress is not None:
            progress(len(keys) - len(missing) + start + len(chunk), len(keys))
    return z


def _digest(*parts: Any) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()[:16]


def _network_key(backbone: Backbone, tensors: Params, device: torch.device, precision: str) -> str:
    """Return a hash of everything that features depend on except for the input."""
    own = [
        (field.name, getattr(backbone, field.name))
        for field in dataclasses.fields(backbone)
        if "runtime" not in field.metadata and field.name not in ("weights", "frozen")
    ]
    preprocessing = getattr(backbone, "preprocessing", None)
    settings = (_BATCH, type(backbone).__name__, own, preprocessing, device.type, precision)
    parts: list[Any] = [repr((*settings, torch.__version__)).encode()]
    for name, value in sorted(tensors.items()):
        parts += [name.encode(), value.detach().cpu().contiguous().numpy()]
    return _digest(*parts).hex()


@contextlib.contextmanager
def _opened(cache_dir: Path, name: str) -> Iterator[sqlite3.Connection]:
    """Open the cache of a network, which survives a kill at any time, or raise UserError."""
    path = cache_dir / f"features-{name}.sqlite"
    hint = f"cache_dir={cache_dir} cannot be written"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(_connected(path)) as connection:
            yield connection
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
