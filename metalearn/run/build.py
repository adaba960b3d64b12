"""Build a run from a checked configuration."""

import dataclasses
from typing import Any

import torch

from metalearn.algorithms.base import Algorithm
from metalearn.config import components
from metalearn.config.schema import RunConfig
from metalearn.data.classes import ClassData
from metalearn.engine import Engine, process
from metalearn.engine.kernels import build as kernels
from metalearn.report.result import hash_of
from metalearn.run.engines import make_engines, stored_choices
from metalearn.run.pairings import check, check_inputs, is_transductive
from metalearn.run.parts import (
    algorithm_of,
    augmentation_of,
    cache_folder,
    data_folder,
    device_of,
    mixing_of,
    support_augmentation_of,
)
from metalearn.system import processes
from metalearn.system.errors import UserError
from metalearn.system.processes import Processes
from metalearn.tasks import prng
from metalearn.tasks.family import TaskFamily
from metalearn.tasks.metrics import Metric
from metalearn.tasks.mixing import Mixed
from metalearn.tasks.sampling import SAMPLER_VERSION, BatchSource, Shape, TaskSource
from metalearn.tasks.types import Spec, State

#: Random stream of the initial weights; `metalearn.tasks.sampling` numbers those of the tasks.
_INIT_STREAM = 100


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that the loop needs; the loop knows neither the algorithm nor the dataset.

    Attributes:
        config: The settings.
        algorithm: The method with its backbone.
        state: Initial parameters and buffers.
        train: Tasks or batches of training; those of the test in a run that is only tested.
        val: Tasks of validation; None in a run that is only tested.
        test: Tasks of the test.
        train_engine: Engine of training.
        test_engine: Engine of validation and test.
        device: Device of all tensors.
        processes: The processes that share the work.
        spec: Shapes of inputs and outputs.
        standardisation: Shift and scale of each channel; {} without standardisation.
        protocol: Everything that the measurement depends on, as plain data.
        content_hash: Hash of the data.
        class_names: Names of the classes of each split.
        test_split: The split whose classes are tested.
    """

    config: RunConfig
    algorithm: Algorithm
    state: State
    train: BatchSource
    val: TaskSource | None
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
        """The losses and the metric of the tasks."""
        return self.algorithm.family

    @property
    def metric(self) -> Metric:
        """The metric of validation and test."""
        return self.algorithm.family.metric

    @property
    def protocol_id(self) -> str:
        """Hash of the protocol; results with the same one can be compared."""
        return hash_of(self.protocol)

    @property
    def choices(self) -> dict[str, Any]:
        """The content of engine.json, with which another run repeats the computation."""
        return {
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "processes": self.processes.size,
            "train": self.train_engine.choices,
            "test": self.test_engine.choices,
        }


def build(
    settings: RunConfig,
    only_test: str | None = None,
    is_restored: bool = False,
    channels: int | None = None,
) -> Run:
    """Read the data and build the run.

    Args:
        settings: The run's settings.
        only_test: The split to test on, for a run that is not trained again.
        is_restored: Whether a checkpoint has the weights; see `algorithm_of`.
        channels: Number of channels of the images that the network was trained on, if other images
            should be converted to it.

    Raises:
        UserError: If the settings do not fit together or do not fit the data.
    """
    check(settings)
    device = device_of(settings.device)
    choices = stored_choices(settings.engine)
    threads = choices["threads"] if choices else settings.engine.threads
    process.prepare(device, threads, settings.engine.precision)
    if device.type == "cpu" and settings.engine.convolution in ("auto", "direct"):
        kernels.load(cache_folder(settings))
    group = processes.join_processes(device)
    for name, count in (
        ("train.meta_batch", settings.train.meta_batch),
        ("val.episodes", settings.val.episodes),
        ("test.episodes", settings.test.episodes),
    ):
        if count < group.size:
            raise UserError(
                f"{name}={count}: should be at least {group.size}, the number of processes"
            )
    algorithm = algorithm_of(settings, is_restored)
    dataset = components.make(
        settings.dataset,
        "dataset",
        channels=channels,
        raw=algorithm.backbone.is_external,
        tokenizer=algorithm.backbone.tokenizer(),
    )
    with group.leader_first():
        data = dataset.open(data_folder(settings), cache_folder(settings), device)
    if only_test == "all":
        if not isinstance(data, ClassData):
            raise UserError("split=all: this dataset has no classes; use split=test")
        data = data.with_all_classes()
    episode = settings.episode
    test_shape, train_shape = (
        Shape(shape.way, shape.shot, shape.query, shape.unlabelled, shape.distractors, where)
        for where, shape in (("episode", episode), ("episode.train", episode.train))
    )
    if train_shape == test_shape:  # it usually follows the test's, so errors name that one
        train_shape = test_shape
    check_inputs(settings, algorithm, data.inputs)
    augmentation, mixing = augmentation_of(settings), mixing_of(settings)
    of_support, copies = support_augmentation_of(settings, algorithm), algorithm.support_copies
    test_shape = dataclasses.replace(test_shape, copies=copies)
    test_split = only_test or "test"
    test = data.episodes(test_split, test_shape, settings.episode_seed, of_support)
    train: BatchSource = test  # a foreign dataset need not suffice for training
    val: TaskSource | None = None
    if not only_test:
        train = (
            data.episodes("train", train_shape, settings.seed, augmentation)
            if settings.train.source == "episodes"
            else data.batches("train", settings.train.batch_size, settings.seed, augmentation)
        )
        if mixing is not None:
            is_batch = settings.train.source == "batches"
            train = Mixed(train, mixing, data.num_classes("train") if is_batch else train_shape.way)
        val = data.episodes("val", test_shape, settings.episode_seed, of_support)
    inputs, outputs = data.inputs, data.outputs or episode.way
    spec = Spec(inputs.shape, outputs, data.num_classes("train"), dataset.target, inputs.vocabulary)
    train_engine, test_engine = make_engines(
        settings, algorithm, train.draw(0, 1), test.draw(0, 1), group.size, choices
    )
    state = algorithm.init(spec, prng.key_of(settings.seed, _INIT_STREAM, device=device))
    is_frozen = algorithm.backbone.is_frozen and all(
        name.startswith("net.") for name in state.params
    )
    if is_frozen and settings.train.steps and not only_test:
        raise UserError(
            f"backbone.frozen=true: {type(algorithm).__name__} has no other parameters to train; "
            "test it as it is with train.steps=0"
        )
    can_time = settings.engine.convolution == "auto" and device.type == "cuda"
    can_time = can_time and bool(algorithm.training_steps) and train_engine.strategy != "loop"
    # Several processes could each choose a different convolution.
    if can_time and not choices and not only_test and group.size == 1:
        train_engine = train_engine.time_convolutions(
            state, train.draw(0, settings.train.meta_batch)
        )
        test_engine = dataclasses.replace(test_engine, convolution=train_engine.convolution)
    return Run(
        content_hash=data.content_hash,
        class_names={
            split: data.class_names(split)
            for split in dict.fromkeys(("train", "val", "test", test_split))
        },
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
        processes=group,
        spec=spec,
        standardisation=data.standardisation,
        protocol={
            **data.protocol(test_split),
            "way": test_shape.way,
            "shot": test_shape.shot,
            "query": test_shape.query,
            **({"unlabelled": test_shape.unlabelled} if test_shape.unlabelled else {}),
            **({"distractors": test_shape.distractors} if test_shape.distractors else {}),
            **({"support_copies": copies, "augment": settings.augment.support} if copies else {}),
            "statistics": settings.statistics if algorithm.backbone.normalises else "none",
            "transductive": is_transductive(algorithm),
            "sampler": SAMPLER_VERSION,
            "episodes": settings.test.episodes,
            "episode_seed": settings.episode_seed,
        },
    )
