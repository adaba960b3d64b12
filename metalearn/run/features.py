"""Embed each input once: for tests, and for training with a frozen backbone.

Where an embedding depends on its input alone, episodes gather features instead of images. Features
of frozen networks are cached on disk, by the content of the input and by the network.
"""

import contextlib
import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from metalearn.algorithms.base import Algorithm
from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.gradient import GradientAdaptation
from metalearn.algorithms.linear_head import LinearHeadAlgorithm
from metalearn.algorithms.params import select
from metalearn.backbones.base import Backbone
from metalearn.backbones.normalisation import Normaliser
from metalearn.engine import Engine, channels_last
from metalearn.report.progress import Listener
from metalearn.run import feature_cache
from metalearn.run.build import Run
from metalearn.run.feature_cache import BATCH, FeatureCache, digest, embed_inputs, network_key
from metalearn.run.parts import cache_folder
from metalearn.tasks.ranges import Part, Varied
from metalearn.tasks.sampling import BatchSampler, EpisodeSampler, TaskSource
from metalearn.tasks.store import ArrayStore, Augmented, Store, transferred
from metalearn.tasks.types import Batch, InputSpec, Params, State

#: Largest size of the features of a split in memory.
_MAX_BYTES = 2**30


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
    if not is_own(LinearHeadAlgorithm, "network", "embed", "adapted", "forward"):
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
    parts: list[Part],
    listener: Listener,
) -> tuple[Engine, TaskSource]:
    """Return engine and source for tasks of features, or the given ones if that is impossible.

    Only the inputs of the tasks that will be drawn are embedded.
    """
    sampler = _sampler(source)
    if not isinstance(sampler, EpisodeSampler) or not _is_possible(run, engine, sampler):
        return engine, source
    size = len(sampler.store)
    numbers = torch.arange(4 * size, device=sampler.key.device)  # rotated inputs are extra rows
    drawn: TaskSource = _with_store(source, _Rows(numbers, size=size, position=numbers))
    rows = []
    for part in parts:
        task = drawn.draw(*part)
        examples = (task.support.x, task.query.x, task.support.unlabelled)
        rows.append(torch.cat([x.flatten() for x in examples if x is not None]).unique())
    before = engine
    engine, source = _on_features(run, engine, source, state, torch.cat(rows).unique(), listener)
    if engine is not before:  # features are smaller than images, and need no network
        own = run.config.engine
        chunk = own.task_chunk or own.evaluation_batch
        engine = dataclasses.replace(engine, strategy=own.strategy, chunk=chunk)
        engine = engine.resolve(source.draw(parts[0][0], 1), own.evaluation_batch, False)
    return engine, source


def for_training(run: Run, state: State, listener: Listener) -> Run:
    """Return a run that trains on features, if its backbone is frozen and that saves work."""
    engine, source, train = run.train_engine, run.train, run.config.train
    sampler = _sampler(source)
    if not (
        engine.algorithm.backbone.is_frozen
        and isinstance(sampler, EpisodeSampler | BatchSampler)
        and _is_possible(run, engine, sampler)
    ):
        return run
    rows = sampler.view.index.rows.unique()
    if sampler.view.has_rotations:
        rows = torch.cat([rows + len(sampler.store) * turn for turn in range(4)])
    first = source.draw(0, 1)
    each = (first.x if isinstance(first, Batch) else first.query.x).shape[1]
    if len(rows) > train.steps * train.meta_batch * each:
        return run
    engine, source = _on_features(run, engine, source, state, rows, listener)
    return dataclasses.replace(run, train=source, train_engine=engine)


def _sampler(source: Any) -> Any:
    """Return the sampler of a source whose shapes may vary."""
    return source.source if isinstance(source, Varied) else source


def _with_store(source: Any, store: Store) -> Any:
    """Return a source with other inputs."""
    if isinstance(source, Varied):
        return dataclasses.replace(source, source=_with_store(source.source, store))
    return dataclasses.replace(source, store=store)


def _is_possible(run: Run, engine: Engine, source: EpisodeSampler | BatchSampler) -> bool:
    return (
        run.config.engine.features
        and embeds_alone(engine.algorithm)
        and source.store.spec.kind != "features"
        and not isinstance(source.store, Augmented)
        and (isinstance(source, BatchSampler) or source.support_store is None)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Identity(Backbone):
    """The identity, in the place of the backbone that computed the features."""

    input_kinds: ClassVar[tuple[str, ...]] = ("features",)
    is_frozen: ClassVar[bool] = True

    of: Backbone
    inputs: InputSpec

    @property
    def normalises(self) -> bool:  # type: ignore[override]
        return self.of.normalises

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
        return self.values[transferred(self.position[rows], self.values.device)]


def _on_features(
    run: Run, engine: Engine, source: Any, state: State, rows: Tensor, listener: Listener
) -> tuple[Engine, Any]:
    """Embed rows of a source, int64 [M]; return the engine and the source of their features.

    If these need too much memory, engine and source are returned as they are.
    """
    backbone, store = engine.algorithm.backbone, _sampler(source).store
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
        if store.spec.kind == "tokens":  # without the padding that all texts of the batch have
            x = x[:, : max(1, int(x.count_nonzero(1).max()))]
        with engine.autocast(x.device):
            return backbone.embed(tensors, channels_last(x), given or None)[0]

    keys = [b""] * len(rows)
    cache: contextlib.AbstractContextManager[FeatureCache | None] = contextlib.nullcontext()
    device = run.device
    if backbone.is_frozen:  # the weights of others are of this run only
        for at in range(0, len(rows), BATCH):
            chunk = load(list(range(at, min(at + BATCH, len(rows))))).cpu().contiguous()
            keys[at : at + BATCH] = [digest(x.numpy()) for x in chunk]
        name = network_key(backbone, tensors | given, device, engine.precision)
        cache = feature_cache.opened(cache_folder(run.config), name)
    with cache as opened, torch.no_grad():
        values = embed_inputs(keys, load, network, size, opened, listener.embedding).to(device)
    position = torch.zeros(int(rows.max()) + 1, dtype=torch.int64, device=rows.device)
    position[rows] = torch.arange(len(rows), device=rows.device)
    features = _Rows(values, size=len(store), position=position)
    algorithm = dataclasses.replace(
        engine.algorithm, backbone=_Identity(of=backbone, inputs=store.spec)
    )
    return dataclasses.replace(engine, algorithm=algorithm), _with_store(source, features)
