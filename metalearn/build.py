"""From a checked configuration to a run; the only place that instantiates."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from metalearn import config, processes, random
from metalearn.algorithms.base import Algorithm
from metalearn.config import EngineConfig, RunConfig
from metalearn.engine import Engine, process
from metalearn.episodes import STREAMS, EpisodeSource, Shape, TaskSource
from metalearn.errors import UserError
from metalearn.processes import Processes
from metalearn.types import SCORES, Score, Spec, State, Task

#: Random stream of the initial weights; those of the tasks are numbered in `metalearn.episodes`.
_INIT_STREAM = 100

#: Validation and test episodes in flight together; memory does not depend on their number.
EVALUATION_BATCH = 32


#: Engine settings with which everything is chosen here, or by `engine.choices`.
FREE_CHOICES: dict[str, Any] = {"strategy": "auto", "task_chunk": 0, "threads": 0, "convolution": "auto"}


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything the loop needs; it asks neither which algorithm nor which data set it has."""

    config: RunConfig
    algorithm: Algorithm
    state: State
    train: TaskSource
    val: EpisodeSource | None  # None in a run that is only tested
    test: EpisodeSource
    train_engine: Engine
    test_engine: Engine
    score: Score
    device: torch.device
    processes: Processes
    spec: Spec
    standardisation: dict[str, list[float]]
    protocol: dict[str, Any]
    content_hash: str
    class_names: dict[str, tuple[str, ...]]
    test_split: str

    @property
    def protocol_id(self) -> str:
        """Identifies the measurement alone: equal for all that may stand in one column."""
        return hashlib.sha256(json.dumps(self.protocol, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def choices(self) -> dict[str, Any]:
        """What the engine chose: `engine.json`, with which another run computes just as this one."""
        engines = {"train": self.train_engine.choices, "test": self.test_engine.choices}
        where = {"device": self.device.type, "threads": torch.get_num_threads(), "processes": self.processes.size}
        return {**where, **engines}


def check(settings: RunConfig) -> None:
    """Impossible pairings that are known before any data is read. Raises: UserError."""
    algorithm = algorithm_of(settings)
    target = config.component(settings.dataset, "dataset").target
    name = type(algorithm).__name__
    if target not in algorithm.targets:
        kinds = {"class": "classes", "value": "values (regression)"}
        raise UserError(
            f"algo={name} learns {' or '.join(kinds[kind] for kind in algorithm.targets)}, "
            f"but this data set has {kinds[target]}; choose another algo or dataset"
        )
    episode = settings.episode
    if algorithm.fixed_way and settings.train.source == "episodes" and episode.train.way != episode.way:
        raise UserError(
            f"episode.train.way={episode.train.way} should equal episode.way={episode.way}: "
            f"the number of ways is part of {name}'s weights"
        )
    if settings.train.source not in algorithm.sources:
        raise UserError(
            f"train.source={settings.train.source}: {name} trains on {' or '.join(algorithm.sources)}; "
            f"use train.source={algorithm.sources[0]}"
        )
    if settings.statistics == "population" and not normalises(settings):
        raise UserError("statistics=population wants a backbone with normalisation")
    if settings.engine.rematerialise and (
        not hasattr(algorithm, "rematerialise") or getattr(algorithm, "first_order", False)
    ):
        raise UserError(f"engine.rematerialise=true: {name} has no inner steps whose derivatives are kept")
    device_of(settings.device)


def build(settings: RunConfig, only_test: str | None = None) -> Run:
    """Reads the data and makes the run.

    Args: only_test: the split to test on, for a run that is not trained again.
    Raises: UserError for what the data cannot give.
    """
    check(settings)
    device = device_of(settings.device)
    choices = _stored_choices(settings.engine)
    threads = choices["threads"] if choices else settings.engine.threads
    process.prepare(device, threads, settings.engine.precision)
    together = processes.joined(device)
    for name, count in (
        ("train.meta_batch", settings.train.meta_batch),
        ("val.episodes", settings.val.episodes),
        ("test.episodes", settings.test.episodes),
    ):
        if count < together.size:
            raise UserError(f"{name}={count}: {together.size} processes want one each at least")
    dataset = config.make(settings.dataset, "dataset")
    with together.leader_first():
        data = dataset.open(
            folder_of(settings.data_dir, ".local/share"), folder_of(settings.cache_dir, ".cache"), device
        )
    algorithm = algorithm_of(settings)
    episode = settings.episode
    test_shape = Shape(episode.way, episode.shot, episode.query)
    train_shape = Shape(episode.train.way, episode.train.shot, episode.train.query)
    train: TaskSource = (
        data.episodes("train", train_shape, settings.seed)
        if settings.train.source == "episodes"
        else data.batches("train", settings.train.batch_size, settings.seed)
    )
    val = None if only_test else data.episodes("val", test_shape, settings.episode_seed)
    test_split = only_test or "test"
    test = data.episodes(test_split, test_shape, settings.episode_seed)
    spec = Spec(data.input_shape, episode.way, data.num_classes("train"), data.target)
    train_engine, test_engine = _engines(settings, algorithm, train.draw(0, 1), test.draw(0, 1), together, choices)
    state = algorithm.init(spec, random.key_of(settings.seed, _INIT_STREAM, device=device))
    frozen = getattr(algorithm.backbone, "frozen", False) and all(name.startswith("net.") for name in state.meta)
    if frozen and settings.train.steps and not only_test:
        raise UserError(
            f"backbone.frozen=true: {type(algorithm).__name__} has nothing else to learn; test it as it is with train.steps=0"
        )
    timing = settings.engine.convolution == "auto" and device.type == "cuda" and algorithm.training_steps
    # Several processes would each find their own.
    if timing and not choices and not only_test and train_engine.strategy != "loop" and together.size == 1:
        train_engine = train_engine.timed(state, train.draw(0, together.share(settings.train.meta_batch)[1]))
        test_engine = dataclasses.replace(test_engine, convolution=train_engine.convolution)
    return Run(
        content_hash=data.content_hash,
        class_names={split: data.class_names(split) for split in STREAMS},
        test_split=test_split,
        config=settings,
        algorithm=algorithm,
        state=state,
        train=train,
        val=val,
        test=test,
        train_engine=train_engine,
        test_engine=test_engine,
        score=SCORES[data.target],
        device=device,
        processes=together,
        spec=spec,
        standardisation=data.standardisation,
        protocol={
            **data.protocol(test_split),
            **dataclasses.asdict(test_shape),
            "statistics": settings.statistics if normalises(settings) else "none",
            "episodes": settings.test.episodes,
            "episode_seed": settings.episode_seed,
        },
    )


def _engines(
    settings: RunConfig,
    algorithm: Algorithm,
    train: Task,
    test: Task,
    together: Processes,
    choices: dict[str, Any] | None,
) -> tuple[Engine, Engine]:
    """The engines of training and of testing, for tasks of these shapes."""
    if choices:
        stored = [Engine(algorithm, **choices[part]) for part in ("train", "test")]
        if stored[0].strategy == "mixed" and stored[0].has_own_loss:
            raise UserError("engine.choices: that run's strategy, mixed, does not suit a method with its own loss")
        return stored[0], stored[1]
    asked = settings.engine
    convolution = "plain" if asked.convolution == "auto" else asked.convolution
    unresolved = Engine(algorithm, asked.strategy, asked.task_chunk, asked.precision, convolution)
    count = -(-settings.train.meta_batch // together.size)  # the largest share, so that all processes choose alike
    return unresolved.resolved(train, count, True), unresolved.resolved(test, EVALUATION_BATCH, False)


def _stored_choices(settings: EngineConfig) -> dict[str, Any] | None:
    """What another run's engine chose. Raises: UserError where its file is none, or where something else is asked too."""
    if settings.choices is None:
        return None
    for name, free in FREE_CHOICES.items():
        if (given := getattr(settings, name)) != free:
            raise UserError(f"engine.{name}={given}: engine.choices says that already; leave one out")
    try:
        found = json.loads(Path(settings.choices).read_text())
        right = all(_is_choice(found[part]) for part in ("train", "test"))
        right = right and type(found["threads"]) is int and found["threads"] > 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        right = False
    if not right:
        raise UserError(f"engine.choices={settings.choices}: is not an engine.json of a run")
    if found["train"]["precision"] != settings.precision:
        raise UserError(f"engine.precision={settings.precision}: that run had {found['train']['precision']}")
    return found


def _is_choice(found: dict[str, Any]) -> bool:
    """Whether these are the choices of an engine, with values it can have."""
    settings = {field.name: field.metadata.get("choices", ()) for field in dataclasses.fields(EngineConfig)}
    words = {name: set(settings[name]) - {"auto"} for name in ("strategy", "precision", "convolution")}
    fields = {field.name for field in dataclasses.fields(Engine)} - {"algorithm"}
    return (
        found.keys() == fields
        and all(found[name] in allowed for name, allowed in words.items())
        and type(found["chunk"]) is int
        and found["chunk"] > 0
    )


def from_checkpoint(settings: RunConfig) -> RunConfig:
    """Settings of a run whose weights lie in a checkpoint, so that no file of a backbone's weights is read."""
    if not settings.backbone.get("weights"):
        return settings
    return dataclasses.replace(settings, backbone=settings.backbone | {"weights": None})


def algorithm_of(settings: RunConfig) -> Algorithm:
    """The method with its backbone."""
    return config.make(
        settings.algo,
        "algo",
        backbone=config.make(settings.backbone, "backbone"),
        statistics=settings.statistics,
        statistics_momentum=settings.train.statistics_momentum,
        rematerialise=settings.engine.rematerialise,
    )


def normalises(settings: RunConfig) -> bool:
    return settings.backbone.get("normalisation") != "none"


def device_of(name: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" stands for. Raises: UserError where there is no such device."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("device=cuda: torch finds no CUDA device here; use device=cpu or device=auto")
    return torch.device("cuda", processes.local_rank()) if available and name != "cpu" else torch.device("cpu")


def folder_of(path: str | None, default: str) -> Path:
    """`data_dir` or `cache_dir` as given, or the user's own one below `default`."""
    return (Path(path).expanduser() if path else Path.home() / default / "metalearn").absolute()
