"""Contract checks for methods, datasets and backbones: this package's own, and those of plugins.

    from metalearn import testing
    testing.check_method("protonet")
    testing.check_method(MyMethod, temperature=0.1)

Each check raises AssertionError with what is wrong. `METHOD_CHECKS`, `DATASET_CHECKS` and `BACKBONE_CHECKS` are the single checks
by name, for parametrised tests. They need no files and no network, and take seconds.
"""

import dataclasses
import functools
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from metalearn.algorithms.base import Algorithm
from metalearn.algorithms.normalisation import STATISTICS
from metalearn.backbones.base import Backbone
from metalearn.config import checking, composition
from metalearn.data.base import Dataset
from metalearn.engine import Engine
from metalearn.report.stats import estimate
from metalearn.run import loop
from metalearn.run.build import Run, build
from metalearn.run.parts import family_of
from metalearn.run.step import Training
from metalearn.tasks import prng
from metalearn.tasks.sampling import Shape, TaskSource
from metalearn.tasks.types import Batch, InputSpec, Params, Query, Spec, Support, Task

#: Easy classes of feature vectors, a small network, few episodes.
_SMALL = (
    "dataset=gaussians", "backbone.hidden=[16]", "episode.way=5", "episode.shot=1", "episode.query=5", "train.meta_batch=4",
    "train.batch_size=64", "val.episodes=100", "test.episodes=100", "logger=none", "device=cpu",
)  # fmt: skip
_STEPS = 60
_HALF = torch.tensor(0.5, dtype=torch.float64)


def as_double(tree: Any) -> Any:
    """Return the same tree in float64."""
    return pytree.tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, tree)


@dataclasses.dataclass(frozen=True)
class Method:
    """A method under test: its name in `conf/algo/`, or its class and settings."""

    cls: str | type[Algorithm]
    settings: tuple[tuple[str, Any], ...] = ()

    def run(self, *words: str) -> Run:
        """Return a small run of the method. words: overrides of its configuration."""
        if isinstance(self.cls, str):
            own = [f"algo.{name}={value}" for name, value in self.settings]
            settings = checking.checked(
                composition.composed([f"algo={self.cls}", *_SMALL, *own, *words])
            )
            if not settings.optimiser["_target_"].endswith("SGD"):
                settings.train.lr = 0.01
            return build(settings)
        source = "batches" if "episodes" not in self.cls.sources else "episodes"
        more = ["train.lr=0.01", f"train.source={source}"]
        settings = checking.checked(composition.composed(["algo=protonet", *_SMALL, *more, *words]))
        run = build(settings)
        algorithm = self.cls(
            backbone=run.algorithm.backbone, statistics=settings.statistics, family=family_of(settings), source=source,
            **dict(self.settings),
        )  # fmt: skip
        state = algorithm.init(run.spec, prng.key_of(settings.seed, 100))
        engine = Engine(algorithm, "vmap", 4)
        return dataclasses.replace(
            run, algorithm=algorithm, state=state, train_engine=engine, test_engine=engine
        )

    @functools.cached_property
    def trained(self) -> tuple[Run, float, float, Any]:
        """A run after a short training: (run, validation before and after, trained state)."""
        run = self.run(f"train.steps={_STEPS}", f"val.every={_STEPS}")
        assert run.val is not None
        before = loop.evaluate(run, run.state, run.val, 100)
        with tempfile.TemporaryDirectory() as folder:
            fitted = loop.fit(run, loop.Silent(), Path(folder))
        sign = 1 if run.metric.higher_is_better else -1
        first = estimate(sign * before)
        return run, first.mean + first.ci95, sign * fitted.best_val.mean, fitted.state


def _has_loss(run: Run, strategy: str) -> bool:
    return strategy != "mixed" or not run.train_engine.has_own_loss(run.train.draw(0, 1))


def strategies_agree(method: Method, *words: str) -> None:
    """All ways to batch tasks give the same gradients and predictions, under all statistics (float64)."""
    for statistics in STATISTICS:
        run = method.run(f"statistics={statistics}", *words)
        tasks, state = as_double(run.train.draw(0, 4)), as_double(run.state)
        steps = [
            Engine(run.algorithm, strategy, chunk).at(0.5).step(state, tasks, _HALF)
            for strategy, chunk in (("vmap", 4), ("vmap", 3), ("loop", 1), ("mixed", 2))
            if _has_loss(run, strategy)
        ]
        for other in steps[1:]:
            for name in ("gradients", "statistics", "buffers", "losses"):
                ours, theirs = getattr(steps[0], name), getattr(other, name)
                torch.testing.assert_close(theirs, ours, rtol=1e-7, atol=1e-9)
        tested = as_double(run.test.draw(0, 4))
        predictions = [
            Engine(run.algorithm, one, 2).predictions(state, tested)
            for one in ("vmap", "loop", "mixed")
        ]
        for found in predictions[1:]:
            torch.testing.assert_close(found, predictions[0], rtol=1e-7, atol=1e-9)


def gradients_reach_every_parameter(method: Method) -> None:
    """Meta-gradients are finite, and none is zero for all tasks."""
    run = method.run()
    gradients = (
        run.train_engine.at(0.5).step(run.state, run.train.draw(0, 4), _HALF.float()).gradients
    )
    assert gradients.keys() == run.state.params.keys()
    for name, value in gradients.items():
        assert value.isfinite().all(), f"the gradient of {name} is not finite"
        assert value.abs().max() > 1e-9, f"{name} gets no gradient"


def seed_decides(method: Method) -> None:
    """The same seed gives the same first step bit for bit; another seed gives another one."""

    def first_step(seed: int) -> Params:
        run = method.run(f"seed={seed}")
        return (
            run.train_engine.at(0.5).step(run.state, run.train.draw(0, 2), _HALF.float()).gradients
        )

    first, again, other = first_step(3), first_step(3), first_step(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def transduction_is_declared(method: Method) -> None:
    """A prediction depends on the other queries exactly if the statistics or `is_transductive` say so."""
    for name, statistics in STATISTICS.items():
        run = method.run(f"statistics={name}")
        task = pytree.tree_map(lambda leaf: leaf[0], as_double(run.test.draw(0, 1)))
        state = as_double(run.state)
        learner = run.algorithm.adapt(state, task.support, key=task.key)
        together = run.algorithm.predict(state, learner, task.query.x)
        apart = torch.cat([run.algorithm.predict(state, learner, x) for x in task.query.x.split(5)])
        depends = statistics.is_transductive or run.algorithm.is_transductive
        assert torch.allclose(together, apart) != depends, (
            f"statistics={name}: wrong about depending on other queries"
        )


def symmetries_are_declared(method: Method) -> None:
    """`class_equivariant` and `support_order_matters` are true."""
    run = method.run("episode.shot=2")
    task, state = as_double(run.test.draw(0, 3)), as_double(run.state)
    engine = Engine(run.algorithm, "vmap", 3)
    before = engine.predictions(state, task)
    order = torch.tensor([2, 0, 1, 4, 3])
    relabelled = dataclasses.replace(
        task,
        support=dataclasses.replace(task.support, y=order[task.support.y]),
        query=dataclasses.replace(task.query, y=order[task.query.y]),
    )
    after = engine.predictions(state, relabelled)[..., order]
    same = torch.allclose(after, before, rtol=1e-6, atol=1e-8)
    assert same == run.algorithm.class_equivariant, "class_equivariant is not what the method does"
    support = dataclasses.replace(task.support, x=task.support.x.flip(1), y=task.support.y.flip(1))
    after = engine.predictions(state, dataclasses.replace(task, support=support))
    same = torch.allclose(after, before, rtol=1e-6, atol=1e-8)
    assert same != run.algorithm.support_order_matters, (
        "support_order_matters is not what the method does"
    )


def training_improves(method: Method) -> None:
    """A short training on easy classes improves the validation score."""
    _, before, after, _ = method.trained
    assert after > before, (
        f"validation {after:.3f} after {_STEPS} steps, at most {before:.3f} before"
    )


@dataclasses.dataclass(frozen=True)
class _Shuffled:
    """Tasks whose query labels, or whose support labels, are shuffled: nothing can be learned."""

    source: TaskSource
    part: str

    def draw(self, first: int | Tensor, count: int) -> Task:
        task = self.source.draw(first, count)
        labelled = getattr(task, self.part)
        order = prng.permutation(prng.fold_in(task.key, 77), labelled.y.shape[1])
        changed = dataclasses.replace(labelled, y=labelled.y.gather(1, order))
        return dataclasses.replace(task, **{self.part: changed})

    def classes(self, first: int, count: int) -> Tensor | None:
        return self.source.classes(first, count)


def labels_alone_are_learned_from(method: Method) -> None:
    """A trained method is above chance, at chance where labels are shuffled, and misled by wrong labels."""
    run, _, _, state = method.trained
    right = estimate(loop.evaluate(run, state, run.test, 100))
    assert right.mean - 3 * right.ci95 > 0.2, (
        f"test accuracy {right.mean:.3f} ± {right.ci95:.3f} is not above chance"
    )
    for part in ("query", "support"):
        shuffled = estimate(loop.evaluate(run, state, _Shuffled(run.test, part), 400))
        assert abs(shuffled.mean - 0.2) < 1.5 * shuffled.ci95, (
            f"{part} labels shuffled: {shuffled.mean:.3f}, not 0.2"
        )
    task = run.test.draw(0, 100)
    support = dataclasses.replace(task.support, y=(task.support.y + 1) % 5)
    misled = run.test_engine.scores(state, dataclasses.replace(task, support=support))
    loss = estimate(run.test_engine.scores(state, task) - misled)
    assert loss.mean - 2 * loss.ci95 > 0, (
        f"wrong labels cost {loss.mean:.3f} ± {loss.ci95:.3f} of accuracy alone"
    )


def runs_on_any_device(method: Method) -> None:
    """A meta-step works on torch's `meta` device: no value is read on the host, and no tensor is made on another device."""

    def to_meta(tree: Any) -> Any:
        return pytree.tree_map(
            lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, tree
        )

    run, device = method.run("optimiser=sgd", "train.clip_norm=1"), torch.device("meta")
    state, tasks = to_meta(run.state), to_meta(run.train.draw(0, 4))
    for strategy in ("vmap", "loop", "mixed"):
        if _has_loss(run, strategy):
            engine = Engine(run.algorithm, strategy, 4).at(0.5)
            step = engine.step(state, tasks, torch.zeros((), device=device))
            assert {leaf.device for leaf in pytree.tree_leaves(step)} == {device}
    assert (
        Engine(run.algorithm, "vmap", 4).predictions(state, to_meta(run.test.draw(0, 4))).device
        == device
    )
    fixed = dataclasses.replace(run, state=state, device=device, train=_Fixed(tasks))
    for momentum in (0.0, 0.9):
        run.config.optimiser["momentum"] = momentum
        training = Training(fixed)
        for leaf in state.params.values():
            leaf.grad = torch.zeros_like(leaf)
        training.optimiser.step()  # makes its state, as the first step of a run does
        training.has_stepped = True
        training.meta_step()


@dataclasses.dataclass(frozen=True)
class _Fixed:
    """The same tasks at every step."""

    tasks: Task | Batch

    def draw(self, first: int | Tensor, count: int) -> Task | Batch:
        return self.tasks


METHOD_CHECKS: dict[str, Callable[[Method], None]] = {
    check.__name__: check
    for check in (
        strategies_agree, gradients_reach_every_parameter, seed_decides, transduction_is_declared, symmetries_are_declared,
        training_improves, labels_alone_are_learned_from, runs_on_any_device,
    )
}  # fmt: skip


def check_method(method: str | type[Algorithm], **settings: Any) -> None:
    """Hold a method to the contract that every method keeps.

    Args:
        method: its name in `conf/algo/` (also of a plugin), or its class.
        settings: of the method; for a class, all that have no default.

    Raises:
        AssertionError: for a promise that it does not keep.
    """
    case = Method(method, tuple(settings.items()))
    for check in METHOD_CHECKS.values():
        check(case)


@dataclasses.dataclass(frozen=True)
class DatasetCase:
    """A dataset under test, opened twice, and the shape of a small episode."""

    dataset: Dataset
    data_dir: Path
    cache_dir: Path
    shape: Shape

    @functools.cached_property
    def opened(self) -> Any:
        return self.dataset.open(self.data_dir, self.cache_dir, torch.device("cpu"))

    def tasks(self, split: str, seed: int = 0, count: int = 4) -> Task:
        task: Task = self.opened.episodes(split, self.shape, seed).draw(0, count)
        return task


def opens_the_same_again(case: DatasetCase) -> None:
    """Opened again, it holds the same data; its protocol is plain data."""
    again = case.dataset.open(case.data_dir, case.cache_dir, torch.device("cpu"))
    assert again.content_hash == case.opened.content_hash
    for split in ("train", "val", "test"):
        assert json.loads(json.dumps(again.protocol(split))) == case.opened.protocol(split)
        assert again.class_names(split) == case.opened.class_names(split)


def splits_share_no_class(case: DatasetCase) -> None:
    """No class is in two splits."""
    names = [case.opened.class_names(split) for split in ("train", "val", "test")]
    together = [name for each in names for name in each]
    assert len(together) == len(set(together))


def tasks_have_their_shape(case: DatasetCase) -> None:
    """Inputs, labels, unlabelled examples and keys have the shapes and types of the contract."""
    shape, inputs = case.shape, case.opened.inputs
    for split in ("train", "val", "test"):
        task = case.tasks(split)
        for part, each in ((task.support, shape.shot), (task.query, shape.query)):
            assert part.x.shape == (4, shape.way * each, *inputs.shape)
            assert part.x.dtype == (torch.int64 if inputs.kind == "tokens" else torch.float32)
            if case.dataset.target == "class":
                assert part.y.dtype == torch.int64
                assert (
                    part.y.sort(-1).values == torch.arange(shape.way).repeat_interleave(each)
                ).all()
        assert task.support.way == shape.way
        assert task.key.shape == (4,) and task.key.unique().numel() == 4


def tasks_depend_on_seed_and_number(case: DatasetCase) -> None:
    """A task is a function of seed, split and number, in whatever groups tasks are drawn."""
    source = case.opened.episodes("train", case.shape, 0)
    together, apart = source.draw(0, 4), [source.draw(first, 2) for first in (0, torch.tensor(2))]
    assert torch.equal(together.query.x, torch.cat([part.query.x for part in apart]))
    assert torch.equal(together.support.y, torch.cat([part.support.y for part in apart]))
    assert not torch.equal(together.query.x, case.tasks("train", seed=1).query.x)


def support_and_query_are_disjoint(case: DatasetCase) -> None:
    """No query of a task equals a support example."""
    task = case.tasks("train", count=8)
    for support, query in zip(task.support.x.flatten(2), task.query.x.flatten(2), strict=True):
        assert not (support[:, None] == query[None]).all(-1).any(), (
            "a query is also in the support set"
        )


def batches_have_global_labels(case: DatasetCase) -> None:
    """Ordinary batches have inputs of the same shape, and labels of all training classes."""
    batch = case.opened.batches("train", 64, 0).draw(0, 3)
    assert batch.x.shape == (3, 64, *case.opened.inputs.shape)
    assert batch.key.shape == (3,)
    if case.dataset.target == "class":
        assert 0 <= batch.y.min() <= batch.y.max() < case.opened.num_classes("train")


DATASET_CHECKS: dict[str, Callable[[DatasetCase], None]] = {
    check.__name__: check
    for check in (
        opens_the_same_again, splits_share_no_class, tasks_have_their_shape, tasks_depend_on_seed_and_number,
        support_and_query_are_disjoint, batches_have_global_labels,
    )
}  # fmt: skip


def check_dataset(
    dataset: Dataset, data_dir: Path, cache_dir: Path, shape: Shape | None = None
) -> None:
    """Hold a dataset to the contract that every dataset keeps.

    Args:
        dataset: its settings.
        data_dir: where its files are.
        cache_dir: for what it decodes.
        shape: of an episode that it can fill; None: 3-way, 1 shot, 2 queries (for regression 1-way).

    Raises:
        AssertionError: for a promise that it does not keep.
    """
    way = 3 if dataset.target == "class" else 1
    case = DatasetCase(dataset, data_dir, cache_dir, shape or Shape(way, 1, 2))
    for check in DATASET_CHECKS.values():
        check(case)


@dataclasses.dataclass(frozen=True)
class BackboneCase:
    """A backbone under test, the kind of inputs it gets, and a batch of them in float64."""

    backbone: Backbone
    inputs: InputSpec

    @functools.cached_property
    def params(self) -> Params:
        return as_double(self.backbone.init(self.inputs, prng.key_of(0))[0])  # type: ignore[no-any-return]

    @functools.cached_property
    def x(self) -> Tensor:
        key = prng.key_of(1)
        if self.inputs.vocabulary is not None:
            return prng.integers(key, (6, *self.inputs.shape), self.inputs.vocabulary)
        return prng.normal(key, (6, *self.inputs.shape)).double()


def initialises_by_its_key(case: BackboneCase) -> None:
    """Initial parameters are a function of the key, on its device, and the population is that of a standard normal."""
    first, population = case.backbone.init(case.inputs, prng.key_of(0))
    again, other = (case.backbone.init(case.inputs, prng.key_of(seed))[0] for seed in (0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first) or not first
    assert bool(population) == case.backbone.normalises
    assert (
        not any(name.startswith("conv") and name.endswith("bias") for name in first)
        or not population
    )


def embeds_in_its_shape(case: BackboneCase) -> None:
    """Embeddings are flat, and `shape` says how many numbers they have."""
    z, seen = case.backbone.embed(case.params, case.x)
    assert z.shape == (6, math.prod(case.backbone.shape(case.inputs))) and not seen


def given_statistics_are_used(case: BackboneCase) -> None:
    """With the statistics of a batch given, each input is embedded alone as in that batch."""
    own, seen = case.backbone.embed(case.params, case.x, collect=True)
    assert bool(seen) == case.backbone.normalises
    assert seen.keys() == case.backbone.init(case.inputs, prng.key_of(0))[1].keys()
    torch.testing.assert_close(case.backbone.embed(case.params, case.x[:2], given=seen)[0], own[:2])


def film_scales_and_shifts(case: BackboneCase) -> None:
    """A task's scale and shift after each normalisation change nothing at zero, and each gets a gradient."""
    film = as_double(case.backbone.film(case.inputs, torch.device("cpu")))
    plain = case.backbone.embed(case.params, case.x)[0]
    torch.testing.assert_close(case.backbone.embed(case.params, case.x, film=film)[0], plain)

    def loss(film: Params) -> Tensor:
        return case.backbone.embed(case.params, case.x, film=film)[0].square().sum()

    for name, value in torch.func.grad(loss)(film).items():
        assert value.abs().max() > 0, f"{name} gets no gradient"


def maps_over_tasks(case: BackboneCase) -> None:
    """Under `vmap` with parameters of each task's own, second derivatives are those of one task after the other."""
    params = {name: torch.stack([value, 1.1 * value]) for name, value in case.params.items()}
    x = torch.stack([case.x, case.x.flip(0)])

    def second(params: Params, x: Tensor) -> Params:
        def inner(params: Params) -> Tensor:
            return case.backbone.embed(params, x)[0].tanh().square().mean()

        def outer(params: Params) -> Tensor:
            gradient = torch.func.grad(inner)(params)
            return inner({name: value - 0.1 * gradient[name] for name, value in params.items()})

        return torch.func.grad(outer)(params)

    mapped = vmap(second)(params, x)
    for number in range(2):
        alone = second({name: value[number] for name, value in params.items()}, x[number])
        for name, value in alone.items():
            torch.testing.assert_close(mapped[name][number], value, rtol=1e-6, atol=1e-9)


BACKBONE_CHECKS: dict[str, Callable[[BackboneCase], None]] = {
    check.__name__: check
    for check in (
        initialises_by_its_key, embeds_in_its_shape, given_statistics_are_used, film_scales_and_shifts, maps_over_tasks,
    )
}  # fmt: skip


def check_backbone(backbone: Backbone, inputs: InputSpec) -> None:
    """Hold a backbone to the contract that every backbone keeps.

    Args:
        backbone: the network.
        inputs: what it gets: InputSpec((3, 32, 32)) for images, InputSpec((16,)) for features, InputSpec((20,), 1000) for
            tokens.

    Raises:
        AssertionError: for a promise that it does not keep.
    """
    case = BackboneCase(backbone, inputs)
    for check in BACKBONE_CHECKS.values():
        check(case)


__all__ = [
    "BACKBONE_CHECKS", "DATASET_CHECKS", "METHOD_CHECKS", "BackboneCase", "DatasetCase", "InputSpec", "Method", "Query", "Shape",
    "Spec", "Support", "check_backbone", "check_dataset", "check_method",
]  # fmt: skip
