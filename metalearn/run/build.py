"""Build a run from a checked configuration."""

import dataclasses
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from metalearn.algorithms.base import Algorithm
from metalearn.config import components
from metalearn.config.schema import RunConfig
from metalearn.data.base import OpenDataset
from metalearn.data.classes import ClassData
from metalearn.engine import Engine, memory, process
from metalearn.engine.kernels import build as kernels
from metalearn.report.result import hash_of
from metalearn.run import checkpoint, clusters, optimisers, parts
from metalearn.run.engines import make_engines, stored_choices
from metalearn.run.pairings import check, check_inputs
from metalearn.run.protocol import protocol_of
from metalearn.system import processes
from metalearn.system.errors import UserError
from metalearn.system.processes import Processes
from metalearn.tasks import prng
from metalearn.tasks.choosing import HardClasses
from metalearn.tasks.family import TaskFamily
from metalearn.tasks.metrics import Metric
from metalearn.tasks.mixing import Mixed
from metalearn.tasks.ranges import varied
from metalearn.tasks.sampling import BatchSampler, BatchSource, EpisodeSampler, TaskSource
from metalearn.tasks.types import Spec, State

#: Random stream of the initial weights; `metalearn.tasks.sampling` numbers those of the tasks.
_INIT_STREAM = 100


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that the loop needs; the loop knows neither the algorithm nor the dataset."""

    config: RunConfig
    algorithm: Algorithm
    state: State  # initial parameters and buffers
    train: BatchSource  # in a run that is only tested: the test's
    val: TaskSource | None  # None in a run that is only tested
    test: TaskSource
    train_engine: Engine
    test_engine: Engine  # of validation, too
    test_batch: int  # validation and test episodes drawn at once
    device: torch.device
    processes: Processes
    spec: Spec
    standardisation: dict[str, list[float]]  # shift and scale of each channel, or {}
    protocol: dict[str, Any]  # everything that the measurement depends on, as plain data
    data: OpenDataset
    class_names: dict[str, tuple[str, ...]]  # of each split
    test_split: str  # the split whose classes are tested
    shapes_vary: bool = False  # whether training episodes differ in shape from step to step
    hard_classes: HardClasses | None = None  # recent errors, if training draws classes by them
    notes: Sequence[str] = ()  # lines about the data for the user

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
    def draws_on_host(self) -> bool:
        """True if the inputs are on the host, so that tasks are drawn there."""
        return isinstance(self.data, ClassData) and self.data.is_on_host

    @property
    def reason_not_captured(self) -> str | None:
        """Why a meta-step is not captured as a CUDA graph, or None."""
        if not self.config.engine.cuda_graph:
            return "engine.cuda_graph=false"
        if self.shapes_vary:
            return "the shapes of episodes differ from step to step"
        if self.processes.size > 1:
            return "several processes exchange gradients within a step"
        name = self.config.optimiser["_target_"].rpartition(".")[2]
        is_possible = optimisers.can_be_captured(getattr(torch.optim, name))
        return None if is_possible else f"{name} cannot be captured"

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


def open_data(
    settings: RunConfig, algorithm: Algorithm, device: torch.device, **runtime: Any
) -> OpenDataset:
    """Open the dataset for a method's backbone, or raise UserError; `runtime`: see `make`."""
    backbone = algorithm.backbone
    given = {"raw": backbone.is_external, "tokenizer": backbone.tokenizer(), **runtime}
    dataset = components.make(settings.dataset, "dataset", **given)
    data: OpenDataset = dataset.open(
        parts.data_folder(settings), parts.cache_folder(settings), device
    )
    return data


def build(
    settings: RunConfig,
    only_test: str | None = None,
    is_restored: bool = False,
    data: OpenDataset | None = None,
) -> Run:
    """Read the data, unless they are given, and build the run.

    `only_test` is the split to test on, for a run that is not trained again. Raise UserError if the
    settings do not fit together or do not fit the data.
    """
    check(settings, is_restored)
    device = parts.device_of(settings.device)
    choices = stored_choices(settings.engine)
    threads = choices["threads"] if choices else settings.engine.threads
    process.prepare(device, threads, settings.engine.precision)
    if device.type == "cpu" and settings.engine.convolution in ("auto", "direct"):
        kernels.load(parts.cache_folder(settings))
    group = processes.join_processes(device)
    for name in ("train.meta_batch", "val.episodes", "test.episodes"):
        if (count := operator.attrgetter(name)(settings)) < group.size:
            raise UserError(
                f"{name}={count}: should be at least {group.size}, the number of processes"
            )
    algorithm = parts.algorithm_of(settings, is_restored)
    if data is None:
        with group.leader_first():
            data = open_data(settings, algorithm, device)
    check_inputs(settings, algorithm, data.inputs)
    augmentation, mixing = parts.augmentation_of(settings), parts.mixing_of(settings)
    of_support = parts.support_augmentation_of(settings, algorithm)
    test_shape, test_ranges = parts.shapes_of(settings.episode, "episode")
    train_shape, train_ranges = parts.shapes_of(settings.episode.train, "episode.train")
    if train_shape == test_shape:  # it usually follows the test's, so errors name that one
        train_shape = test_shape
    test_shape = dataclasses.replace(test_shape, copies=algorithm.support_copies)
    test_split = only_test or "test"

    def tested(split: str) -> tuple[TaskSource, TaskSource]:
        seed = settings.episode_seed
        own = data.episodes(split, test_shape, seed, of_support)
        return own, varied(own, test_ranges, split, seed)

    largest_test, test = tested(test_split)
    largest: BatchSource = largest_test
    train: BatchSource = test  # a foreign dataset need not suffice for training
    val: TaskSource | None = None
    hard_classes, shapes_vary = None, False
    training: OpenDataset = data
    notes: list[str] = []
    if not only_test:
        is_episodic = settings.train.source == "episodes"
        with group.leader_first():
            training, notes = clusters.training_data(
                settings, data, train_shape.examples if is_episodic else 1
            )
        if is_episodic:
            shapes_vary = train_ranges is not None
            own = training.episodes("train", train_shape, settings.seed, augmentation)
            meta_batch = settings.train.meta_batch
            largest, train = own, varied(own, train_ranges, "train", settings.seed, meta_batch)
            hard_classes = own.view.chooser.hard if isinstance(own, EpisodeSampler) else None
            if hard_classes and isinstance(data, ClassData) and data.is_on_host:
                raise UserError(
                    "episode.train.sampler=hard: tasks are drawn on the host before the last step "
                    "is done, so classes cannot be chosen by its errors; use dataset.store=device"
                )
        else:
            size = settings.train.batch_size
            train = training.batches("train", size, settings.seed, augmentation)
            if algorithm.num_views > 1:
                assert isinstance(train, BatchSampler)
                train = dataclasses.replace(train, num_views=algorithm.num_views)
            largest = train
        if mixing is not None:
            train = Mixed(train, mixing, training.num_classes("train"))
        val = tested("val")[1]
    inputs, outputs = data.inputs, data.outputs or test_shape.way
    target = components.component(settings.dataset, "dataset").target
    spec = Spec(inputs.shape, outputs, training.num_classes("train"), target, inputs.vocabulary)
    test_batch = settings.engine.evaluation_batch
    test_batch = test_batch or memory.episodes_at_once(device, largest_test.draw(0, 1))
    train_engine, test_engine = make_engines(
        settings, algorithm, largest.draw(0, 1), largest_test.draw(0, 1), group.size, test_batch,
        choices,
    )  # fmt: skip
    state = algorithm.init(spec, prng.key_of(settings.seed, _INIT_STREAM, device=device))
    if settings.train.start and not only_test and not is_restored:
        state = checkpoint.start_from(Path(settings.train.start), state, device)
    is_frozen = algorithm.backbone.is_frozen and all(
        name.startswith("net.") for name in state.params
    )
    if is_frozen and settings.train.steps and not only_test:
        raise UserError(
            f"backbone.frozen=true: {type(algorithm).__name__} has no other parameters to train; "
            "test it as it is with train.steps=0"
        )
    run = Run(
        data=data,
        class_names={
            split: (training if split == "train" else data).class_names(split)
            for split in dict.fromkeys(("train", "val", "test", test_split))
        },
        test_split=test_split,
        shapes_vary=shapes_vary,
        hard_classes=hard_classes,
        notes=notes,
        config=settings,
        algorithm=algorithm,
        state=state,
        train=train,
        val=val,
        test=test,
        train_engine=train_engine,
        test_engine=test_engine,
        test_batch=test_batch,
        device=device,
        processes=group,
        spec=spec,
        standardisation=data.standardisation,
        protocol=protocol_of(settings, data, algorithm, test_split),
    )
    can_time = settings.engine.convolution == "auto" and device.type == "cuda"
    can_time = can_time and bool(algorithm.training_steps) and train_engine.strategy != "loop"
    # Several processes could each choose a different convolution.
    if can_time and not choices and not only_test and group.size == 1:
        tasks = run.train.draw(0, settings.train.meta_batch)
        timed = train_engine.time_convolutions(state, tasks, run.reason_not_captured)
        test_engine = dataclasses.replace(test_engine, convolution=timed.convolution)
        run = dataclasses.replace(run, train_engine=timed, test_engine=test_engine)
    if device.type == "cuda" and not (settings.engine.evaluation_batch or choices):
        chunk = settings.engine.task_chunk

        def evaluate(count: int) -> object:
            engine = dataclasses.replace(run.test_engine, chunk=chunk or count)
            return engine.scores(state, largest_test.draw(0, count))

        test_batch = memory.episodes_at_once(device, largest_test.draw(0, 1), evaluate)
        test_engine = dataclasses.replace(
            run.test_engine, chunk=min(chunk or test_batch, test_batch)
        )
        run = dataclasses.replace(run, test_engine=test_engine, test_batch=test_batch)
    return run
