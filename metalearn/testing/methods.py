"""Contract checks for methods."""

import copy
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metalearn.algorithms.base import Algorithm
from metalearn.algorithms.normalisation import STATISTICS
from metalearn.config import checking, components, composition
from metalearn.config import plugins as registry
from metalearn.config.schema import RunConfig
from metalearn.engine import Engine
from metalearn.report.progress import SILENT
from metalearn.report.stats import estimate
from metalearn.run import loop
from metalearn.run.build import Run, build
from metalearn.run.parts import family_of
from metalearn.run.step import Training
from metalearn.tasks import prng
from metalearn.tasks.sampling import BatchSampler, TaskSource
from metalearn.tasks.types import Batch, Params, Task

#: Few episodes.
_SMALL = (
    "episode.way=5", "episode.shot=1", "episode.query=5", "train.meta_batch=4",
    "train.batch_size=64", "val.episodes=100", "test.episodes=100", "logger=none", "device=cpu",
)  # fmt: skip
#: Easy classes of feature vectors and a small network; images, for methods that compare views.
_FEATURES = ("dataset=gaussians", "backbone.hidden=[16]")
_IMAGES = (
    "dataset=glyphs", "dataset.num_classes=60", "dataset.drawings=10", "dataset.image_size=12",
    "dataset.jitter=0.7", "augment=views", "backbone=mlp", "backbone.hidden=[32]",
)  # fmt: skip
_STEPS, _LR = 60, 0.01
_HALF = torch.tensor(0.5, dtype=torch.float64)


def as_double(tree: Any) -> Any:
    """Return the same tree in float64."""
    return pytree.tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, tree)


@dataclasses.dataclass(frozen=True)
class Method:
    """A method under test: its name in `conf/algo/`, or its class, and its settings.

    It is trained for `steps` steps with the learning rate `lr`.
    """

    cls: str | type[Algorithm]
    settings: tuple[tuple[str, Any], ...] = ()
    steps: int = _STEPS
    lr: float = _LR

    @functools.cached_property
    def _configs(self) -> dict[tuple[str, ...], RunConfig]:
        return {}

    @functools.cached_property
    def _small(self) -> tuple[str, ...]:
        cls: Any = self.cls
        if isinstance(cls, str):
            cls = components.component(composition.compose_config([f"algo={cls}"]).algo, "algo")
        return *_SMALL, *(_IMAGES if cls.num_views > 1 else _FEATURES)

    def _config(self, words: tuple[str, ...]) -> RunConfig:
        """Return the checked configuration of a small run, composed once for the same words."""
        if words not in self._configs:
            if isinstance(self.cls, str):
                own = [f"algo.{name}={value}" for name, value in self.settings]
                overrides = [f"algo={self.cls}", *self._small, *own, *words]
            else:
                source = "batches" if "episodes" not in self.cls.sources else "episodes"
                overrides = ["algo=protonet", *self._small, f"train.source={source}", *words]
            config = checking.check_config(composition.compose_config(overrides))
            if not config.optimiser["_target_"].endswith("SGD"):
                config.train.lr = self.lr
            self._configs[words] = config
        return copy.deepcopy(self._configs[words])

    def run(self, *words: str, **changes: Any) -> Run:
        """Return a small run of the method.

        Args:
            *words: Overrides of its configuration.
            **changes: Values of `seed` or `statistics`.
        """
        config = dataclasses.replace(self._config(words), **changes)
        run = build(config)
        if isinstance(self.cls, str):
            return run
        algorithm = self.cls(
            backbone=run.algorithm.backbone,
            statistics=config.statistics,
            family=family_of(config),
            source=config.train.source,
            **dict(self.settings),
        )
        state = algorithm.init(run.spec, prng.key_of(config.seed, 100))
        engine = Engine(algorithm, "vmap", 4)
        train = run.train
        if isinstance(train, BatchSampler):
            train = dataclasses.replace(train, num_views=algorithm.num_views)
        return dataclasses.replace(
            run, algorithm=algorithm, state=state, train=train, train_engine=engine,
            test_engine=engine,
        )  # fmt: skip

    @functools.cached_property
    def trained(self) -> tuple[Run, float, float, Any]:
        """Train briefly. Return (run, validation before and after, trained state)."""
        run = self.run(f"train.steps={self.steps}", f"val.every={self.steps}")
        assert run.val is not None
        before = loop.evaluate(run, run.state, run.val, 100)
        with tempfile.TemporaryDirectory() as folder:
            fitted = loop.fit(run, SILENT, Path(folder))
        sign = 1 if run.metric.higher_is_better else -1
        first = estimate(sign * before)
        return run, first.mean + first.ci95, sign * fitted.best_val.mean, fitted.state


def _has_loss(run: Run, strategy: str) -> bool:
    return strategy != "mixed" or not run.train_engine.has_own_loss(run.train.draw(0, 1))


def strategies_agree(method: Method, *words: str) -> None:
    """All strategies give the same gradients and predictions, with all statistics (float64)."""
    for statistics in STATISTICS:
        run = method.run(*words, statistics=statistics)
        tasks, state = as_double(run.train.draw(0, 4)), as_double(run.state)
        # An uneven last chunk is independent of the statistics.
        uneven = [("vmap", 3)] if statistics == "query" else []
        steps = [
            Engine(run.algorithm, strategy, chunk).at(0.5).step(state, tasks, _HALF)
            for strategy, chunk in (("vmap", 4), *uneven, ("loop", 1), ("mixed", 2))
            if _has_loss(run, strategy)
        ]
        for other in steps[1:]:
            for name in ("gradients", "statistics", "buffers", "losses"):
                own = getattr(steps[0], name)
                torch.testing.assert_close(getattr(other, name), own, rtol=1e-7, atol=1e-9)
        tested = as_double(run.test.draw(0, 4))
        ours, *others = (
            Engine(run.algorithm, one, 2).predictions(state, tested)
            for one in ("vmap", "loop", "mixed")
        )
        for theirs in others:
            torch.testing.assert_close(theirs, ours, rtol=1e-7, atol=1e-9)


def gradients_reach_every_parameter(method: Method) -> None:
    """Meta-gradients are finite, and none is zero for all tasks."""
    run = method.run()
    gradients = _gradients(run, 4)
    assert gradients.keys() == run.state.params.keys()
    for name, value in gradients.items():
        assert value.isfinite().all(), f"the gradient of {name} is not finite"
        assert value.abs().max() > 1e-9, f"{name} gets no gradient"


def _gradients(run: Run, count: int) -> Params:
    """Return the meta-gradients of the first tasks."""
    engine = run.train_engine.at(0.5)
    return engine.step(run.state, run.train.draw(0, count), _HALF.float()).gradients


def seed_decides(method: Method) -> None:
    """The same seed gives the same first step bit for bit; a different seed does not."""
    first, again, other = (_gradients(method.run(seed=seed), 2) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def transduction_is_declared(method: Method) -> None:
    """A prediction depends on other queries if and only if it is declared to.

    The statistics or the method's `is_transductive` declare it.
    """
    for name, statistics in STATISTICS.items():
        run = method.run(statistics=name)
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
    """`class_equivariant` and `support_order_matters` are true, also with unequal shots."""
    run = method.run("episode.shot=2")
    if not run.algorithm.needs_equal_shots:
        run = method.run("episode.shot=3", "episode.unbalanced=true")
    task, state = as_double(run.test.draw(0, 3)), as_double(run.state)
    engine = Engine(run.algorithm, "vmap", 3)
    before = engine.predictions(state, task)
    order = torch.tensor([2, 0, 1, 4, 3])
    relabelled = dataclasses.replace(
        task,
        support=dataclasses.replace(task.support, y=order[task.support.y]),
        query=dataclasses.replace(task.query, y=order[task.query.y]),
    )
    support = dataclasses.replace(task.support, x=task.support.x.flip(1), y=task.support.y.flip(1))
    reordered = dataclasses.replace(task, support=support)
    for name, after, is_expected in (
        ("class_equivariant", engine.predictions(state, relabelled)[..., order], True),
        ("support_order_matters", engine.predictions(state, reordered), False),
    ):
        is_same = torch.allclose(after, before, rtol=1e-6, atol=1e-8)
        is_declared = getattr(run.algorithm, name) == is_expected
        assert is_same == is_declared, f"{name} is not what the method does"


def training_improves(method: Method) -> None:
    """A short training on easy classes improves the validation score."""
    _, before, after, _ = method.trained
    assert after > before, (
        f"validation {after:.3f} after {method.steps} steps, at most {before:.3f} before"
    )


@dataclasses.dataclass(frozen=True)
class _Shuffled:
    """Tasks with shuffled query or support labels, from which nothing can be learned."""

    source: TaskSource
    part: str

    def draw(self, first: int | Tensor, count: int) -> Task:
        task = self.source.draw(first, count)
        labelled = getattr(task, self.part)
        order = prng.permutation(prng.fold_in(task.key, 77), labelled.y.shape[1])
        changed = dataclasses.replace(labelled, y=labelled.y.gather(1, order))
        return dataclasses.replace(task, **{self.part: changed})

    def classes(self, first: int | Tensor, count: int) -> Tensor | None:
        return self.source.classes(first, count)


def labels_alone_are_learned_from(method: Method) -> None:
    """A trained method is above chance, at chance with shuffled labels, misled by wrong ones."""
    run, _, _, state = method.trained
    right = estimate(loop.evaluate(run, state, run.test, 100))
    assert right.mean - 3 * right.ci95 > 0.2, (
        f"test accuracy {right.mean:.3f} ± {right.ci95:.3f} is not above chance"
    )
    for part in ("query", "support"):
        shuffled = estimate(loop.evaluate(run, state, _Shuffled(run.test, part), 200))
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
    """A meta-step works on torch's `meta` device.

    So no value is read on the host, and no tensor is made on a fixed device.
    """

    def to_meta(tree: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda leaf: leaf.to("meta"), tree)

    run, device = method.run("optimiser=sgd", "train.clip_norm=1"), torch.device("meta")
    state, tasks = to_meta(run.state), to_meta(run.train.draw(0, 4))
    for strategy in ("vmap", "loop", "mixed"):
        if _has_loss(run, strategy):
            engine = Engine(run.algorithm, strategy, 4).at(0.5)
            step = engine.step(state, tasks, torch.zeros((), device=device))
            leaves = [leaf for leaf in pytree.tree_leaves(step) if leaf is not None]
            assert {leaf.device for leaf in leaves} == {device}
    tested = Engine(run.algorithm, "vmap", 4).predictions(state, to_meta(run.test.draw(0, 4)))
    assert tested.device == device
    fixed = dataclasses.replace(run, state=state, device=device, train=_Fixed(tasks))
    for momentum in (0.0, 0.9):
        run.config.optimiser["momentum"] = momentum
        training = Training(fixed)
        for leaf in state.params.values():
            leaf.grad = torch.zeros_like(leaf)
        training.optimiser.step()  # creates its state, as the first step of a run does
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
        strategies_agree, gradients_reach_every_parameter, seed_decides, transduction_is_declared,
        symmetries_are_declared, training_improves, labels_alone_are_learned_from,
        runs_on_any_device,
    )
}  # fmt: skip


def check_method(
    method: str | type[Algorithm],
    plugins: Iterable[str] = (),
    *,
    train_steps: int = _STEPS,
    train_lr: float = _LR,
    **settings: Any,
) -> None:
    """Check that a method fulfils the contract of every method.

    Args:
        method: Its name in `conf/algo/` (also of a plugin), or its class.
        plugins: Packages to import and allow, for the name of a method without an entry point.
        train_steps: Number of training steps; a method that learns how to compare needs more.
        train_lr: Learning rate of the training.
        **settings: Settings of the method; for a class, all that have no default.

    Raises:
        AssertionError: If it violates the contract.
    """
    registry.add(plugins)
    case = Method(method, tuple(settings.items()), train_steps, train_lr)
    for check in METHOD_CHECKS.values():
        check(case)
