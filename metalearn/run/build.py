"""From a checked configuration to a run; the only place that instantiates."""

import dataclasses
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch

from metalearn.algorithms.base import Algorithm
from metalearn.algorithms.normalisation import STATISTICS
from metalearn.backbones.base import Backbone
from metalearn.config import components, plugins
from metalearn.config.schema import EngineConfig, RunConfig
from metalearn.engine import Engine, process
from metalearn.run import optimisers
from metalearn.system import processes
from metalearn.system.errors import UserError
from metalearn.system.processes import Processes
from metalearn.tasks import augment, prng
from metalearn.tasks.family import TaskFamily
from metalearn.tasks.losses import LOSSES
from metalearn.tasks.metrics import Metric
from metalearn.tasks.sampling import SAMPLER_VERSION, STREAMS, BatchSource, Shape, TaskSource
from metalearn.tasks.store import Augmentation
from metalearn.tasks.types import Batch, InputSpec, Spec, State, Task

#: Random stream of the initial weights; those of the tasks are numbered in `metalearn.tasks.sampling`.
_INIT_STREAM = 100

#: Validation and test episodes in flight together; memory does not depend on their number.
EVALUATION_BATCH = 32


#: Engine settings with which everything is chosen here, or by `engine.choices`.
FREE_CHOICES: dict[str, Any] = {
    "strategy": "auto",
    "task_chunk": 0,
    "threads": 0,
    "convolution": "auto",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything the loop needs; it asks neither which algorithm nor which data set it has."""

    config: RunConfig
    algorithm: Algorithm
    state: State
    train: BatchSource
    val: TaskSource | None  # None in a run that is only tested
    test: TaskSource
    train_engine: Engine
    test_engine: Engine
    device: torch.device
    processes: Processes
    spec: Spec
    standardisation: dict[str, list[float]]
    protocol: dict[str, Any]
    content_hash: str
    class_names: dict[str, tuple[str, ...]]
    test_split: str

    @property
    def family(self) -> TaskFamily:
        """How tasks are learned from and scored."""
        return self.algorithm.family

    @property
    def metric(self) -> Metric:
        """What validation and test report."""
        return self.algorithm.family.metric

    @property
    def protocol_id(self) -> str:
        """Identifies the measurement alone: equal for all that may stand in one column."""
        return hashlib.sha256(json.dumps(self.protocol, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def choices(self) -> dict[str, Any]:
        """What the engine chose: `engine.json`, with which another run computes just as this one."""
        engines = {"train": self.train_engine.choices, "test": self.test_engine.choices}
        where = {
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "processes": self.processes.size,
        }
        return {**where, **engines}


def check(settings: RunConfig) -> None:
    """Impossible pairings that are known before any data is read. Raises: UserError."""
    algorithm = algorithm_of(settings)
    target = components.component(settings.dataset, "dataset").target
    name = type(algorithm).__name__
    if target not in algorithm.targets:
        raise UserError(
            f"algo={name} learns {' or '.join(described(kind) for kind in algorithm.targets)}, "
            f"but this dataset has {described(target)}; choose another algo or dataset"
        )
    episode = settings.episode
    if (
        algorithm.fixed_way
        and settings.train.source == "episodes"
        and episode.train.way != episode.way
    ):
        raise UserError(
            f"episode.train.way={episode.train.way} should equal episode.way={episode.way}: "
            f"the number of ways is part of {name}'s weights"
        )
    if settings.train.source not in algorithm.sources:
        raise UserError(
            f"train.source={settings.train.source}: {name} trains on {' or '.join(algorithm.sources)}; "
            f"use train.source={algorithm.sources[0]}"
        )
    if algorithm.normalisation.has_population and not algorithm.backbone.normalises:
        raise UserError("statistics=population needs a backbone with normalisation")
    if settings.engine.rematerialise and not algorithm.can_rematerialise:
        raise UserError(
            f"engine.rematerialise=true: {name} has no inner steps whose derivatives are kept"
        )
    if algorithm.uses_unlabelled and not max(episode.unlabelled, episode.train.unlabelled):
        raise UserError(f"algo={name} learns from unlabelled examples; set episode.unlabelled")
    for key, given, is_used in (
        ("loss.name", settings.loss.name, algorithm.uses_loss),
        ("loss.inner", settings.loss.inner, algorithm.uses_inner_loss),
    ):
        if given is not None and not is_used:
            raise UserError(f"{key}={given}: {name} has a loss of its own there; leave it out")
    optimisers.check(settings.optimiser)
    augmentation_of(settings)
    device_of(settings.device)


def build(settings: RunConfig, only_test: str | None = None, is_restored: bool = False) -> Run:
    """Read the data and make the run.

    Args:
        settings: of the run.
        only_test: the split to test on, for a run that is not trained again.
        is_restored: see `algorithm_of`.

    Raises:
        UserError: for what the data cannot give.
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
    dataset = components.make(settings.dataset, "dataset")
    with together.leader_first():
        data = dataset.open(
            folder_of(settings.data_dir, ".local/share"),
            folder_of(settings.cache_dir, ".cache"),
            device,
        )
    algorithm = algorithm_of(settings, is_restored)
    episode = settings.episode
    test_shape, train_shape = (
        Shape(one.way, one.shot, one.query, one.unlabelled, one.distractors)
        for one in (episode, episode.train)
    )
    check_inputs(settings, algorithm, data.inputs)
    changes = augmentation_of(settings)
    train: BatchSource = (
        data.episodes("train", train_shape, settings.seed, changes)
        if settings.train.source == "episodes"
        else data.batches("train", settings.train.batch_size, settings.seed, changes)
    )
    val = None if only_test else data.episodes("val", test_shape, settings.episode_seed)
    test_split = only_test or "test"
    test = data.episodes(test_split, test_shape, settings.episode_seed)
    inputs, outputs = data.inputs, data.outputs or episode.way
    spec = Spec(inputs.shape, outputs, data.num_classes("train"), dataset.target, inputs.vocabulary)
    train_engine, test_engine = _engines(
        settings, algorithm, train.draw(0, 1), test.draw(0, 1), together, choices
    )
    state = algorithm.init(spec, prng.key_of(settings.seed, _INIT_STREAM, device=device))
    frozen = algorithm.backbone.is_frozen and all(name.startswith("net.") for name in state.params)
    if frozen and settings.train.steps and not only_test:
        raise UserError(
            f"backbone.frozen=true: {type(algorithm).__name__} has nothing else to learn; test it as it is with train.steps=0"
        )
    timing = (
        settings.engine.convolution == "auto" and device.type == "cuda" and algorithm.training_steps
    )
    # Several processes would each find their own.
    if (
        timing
        and not choices
        and not only_test
        and train_engine.strategy != "loop"
        and together.size == 1
    ):
        train_engine = train_engine.timed(
            state, train.draw(0, together.share(settings.train.meta_batch)[1])
        )
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
        device=device,
        processes=together,
        spec=spec,
        standardisation=data.standardisation,
        protocol={
            **data.protocol(test_split),
            "way": test_shape.way,
            "shot": test_shape.shot,
            "query": test_shape.query,
            **({"unlabelled": test_shape.unlabelled} if test_shape.unlabelled else {}),
            **({"distractors": test_shape.distractors} if test_shape.distractors else {}),
            "statistics": settings.statistics if algorithm.backbone.normalises else "none",
            "transductive": is_transductive(algorithm),
            "sampler": SAMPLER_VERSION,
            "episodes": settings.test.episodes,
            "episode_seed": settings.episode_seed,
        },
    )


def _engines(
    settings: RunConfig,
    algorithm: Algorithm,
    train: Task | Batch,
    test: Task,
    together: Processes,
    choices: dict[str, Any] | None,
) -> tuple[Engine, Engine]:
    """The engines of training and of testing, for tasks of these shapes."""
    if choices:
        stored = [Engine(algorithm, **choices[part]) for part in ("train", "test")]
        if stored[0].strategy == "mixed" and stored[0].has_own_loss(train):
            raise UserError(
                "engine.choices: that run's strategy, mixed, does not suit a method with its own loss"
            )
        return stored[0], stored[1]
    asked = settings.engine
    convolution = "plain" if asked.convolution == "auto" else asked.convolution
    unresolved = Engine(algorithm, asked.strategy, asked.task_chunk, asked.precision, convolution)
    count = -(
        -settings.train.meta_batch // together.size
    )  # the largest share, so that all processes choose alike
    return unresolved.resolved(train, count, True), unresolved.resolved(
        test, EVALUATION_BATCH, False
    )


def _stored_choices(settings: EngineConfig) -> dict[str, Any] | None:
    """What another run's engine chose. Raises: UserError where its file is none, or where something else is asked too."""
    if settings.choices is None:
        return None
    for name, free in FREE_CHOICES.items():
        if (given := getattr(settings, name)) != free:
            raise UserError(
                f"engine.{name}={given}: engine.choices says that already; leave one out"
            )
    try:
        found = json.loads(Path(settings.choices).read_text())
        right = all(_is_choice(found[part]) for part in ("train", "test"))
        right = right and type(found["threads"]) is int and found["threads"] > 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        right = False
    if not right:
        raise UserError(f"engine.choices={settings.choices}: is not an engine.json of a run")
    if found["train"]["precision"] != settings.precision:
        raise UserError(
            f"engine.precision={settings.precision}: that run had {found['train']['precision']}"
        )
    return found


def _is_choice(found: dict[str, Any]) -> bool:
    """Whether these are the choices of an engine, with values it can have."""
    settings = {
        field.name: field.metadata.get("choices", ()) for field in dataclasses.fields(EngineConfig)
    }
    words = {
        name: set(settings[name]) - {"auto"} for name in ("strategy", "precision", "convolution")
    }
    fields = {field.name for field in dataclasses.fields(Engine)} - {"algorithm"}
    return (
        found.keys() == fields
        and all(found[name] in allowed for name, allowed in words.items())
        and type(found["chunk"]) is int
        and found["chunk"] > 0
    )


def family_of(settings: RunConfig) -> TaskFamily:
    """Return how the run's tasks are learned from and scored. Raises UserError for a loss that does not exist."""
    dataset = components.make(settings.dataset, "dataset")
    known: Any = LOSSES.get(dataset.target, {})
    loss, inner = settings.loss.name, settings.loss.inner
    functions: list[Any] = [
        name and plugins.find(name, known, where)
        for name, where in ((loss, "loss.name"), (inner, "loss.inner"))
    ]
    for key in settings.loss.settings:
        if loss is None or key not in inspect.signature(functions[0]).parameters:
            raise UserError(f"loss.settings.{key}: loss.name={loss} has no such setting")
    family: TaskFamily = dataset.family(*functions, settings.loss.settings)
    return family


def augmentation_of(settings: RunConfig) -> Augmentation | None:
    """Return the changes of training inputs, or None. Raises UserError for one that does not exist."""
    ops: dict[str, Any] = {}
    known: Any = augment.AUGMENTATIONS
    for name, own in settings.augment.ops.items():
        function: Any = plugins.find(name, known, "augment.ops")
        if own is not None and not isinstance(own, dict):
            raise UserError(f"augment.ops.{name}={own}: should hold settings, like {{}}")
        for key in own or {}:
            if key not in inspect.signature(function).parameters:
                raise UserError(f"augment.ops.{name}.{key}: there is no such setting")
        ops[name] = (function, own or {})
    return augment.chain(ops) if ops else None


def algorithm_of(settings: RunConfig, is_restored: bool = False) -> Algorithm:
    """Return the method with its backbone.

    Args:
        settings: of the run.
        is_restored: whether a checkpoint has the weights, so that no file of pretrained ones is read.
    """
    backbone: Backbone = components.make(settings.backbone, "backbone")
    algorithm: Algorithm = components.make(
        settings.algo,
        "algo",
        backbone=backbone.without_weights() if is_restored else backbone,
        statistics=settings.statistics,
        family=family_of(settings),
        source=settings.train.source,
        rematerialise=settings.engine.rematerialise,
    )
    return algorithm


def described(target: str) -> str:
    """Return a kind of target as people call it."""
    return {"class": "classes", "value": "values (regression)"}.get(target, target)


def check_inputs(settings: RunConfig, algorithm: Algorithm, inputs: InputSpec) -> None:
    """Raise UserError where the backbone or the augmentation cannot take these inputs."""
    backbone = algorithm.backbone
    if inputs.kind not in backbone.input_kinds:
        raise UserError(
            f"backbone={type(backbone).__name__} takes {' or '.join(backbone.input_kinds)}, but this dataset has "
            f"{inputs.kind}; choose another backbone"
        )
    if settings.augment.ops and inputs.kind != "images":
        raise UserError(
            f"augment changes images, but this dataset has {inputs.kind}; use augment=none"
        )


def is_transductive(algorithm: Algorithm) -> bool:
    """Return True if a prediction depends on the other queries, by the statistics or by the method itself."""
    by_statistics = algorithm.backbone.normalises and algorithm.normalisation.is_transductive
    return by_statistics or algorithm.is_transductive


def inductive_counterpart(settings: RunConfig, statistics: str) -> str:
    """Return the statistics to hold beside these: the inductive ones of the run for "query", else "query"."""
    if not STATISTICS[statistics].is_transductive:
        return "query"
    return inductive_statistics(settings)


def inductive_statistics(settings: RunConfig) -> str:
    """Return the inductive statistics that a trained run has: those of its population, or else of the support set."""
    return settings.statistics if STATISTICS[settings.statistics].has_population else "support"


def check_population(settings: RunConfig, statistics: str) -> None:
    """Raise UserError where a trained run is asked for population statistics that it did not gather."""
    if STATISTICS[statistics].has_population and not STATISTICS[settings.statistics].has_population:
        raise UserError(
            "statistics=population: this run gathered none; train with statistics=population"
        )


def device_of(name: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" stands for. Raises: UserError where there is no such device."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError(
            "device=cuda: torch finds no CUDA device here; use device=cpu or device=auto"
        )
    return (
        torch.device("cuda", processes.local_rank())
        if available and name != "cpu"
        else torch.device("cpu")
    )


def folder_of(path: str | None, default: str) -> Path:
    """`data_dir` or `cache_dir` as given, or the user's own one below `default`."""
    return (Path(path).expanduser() if path else Path.home() / default / "metalearn").absolute()
