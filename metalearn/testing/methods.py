"""Contract checks for methods."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metalearn.algorithms.base import Algorithm
from metalearn.algorithms.normalisation import STATISTICS
from metalearn.config import plugins as registry
from metalearn.engine import Engine
from metalearn.report.stats import estimate
from metalearn.run import scoring
from metalearn.run.build import Run
from metalearn.run.step import Training
from metalearn.tasks import prng
from metalearn.tasks.sampling import TaskSource
from metalearn.tasks.types import Batch, Params, Task
from metalearn.testing.cases import LR, STEPS, Method, as_double

_HALF = torch.tensor(0.5, dtype=torch.float64)


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
    right = estimate(scoring.evaluate(run, state, run.test, 100))
    assert right.mean - 3 * right.ci95 > 0.2, (
        f"test accuracy {right.mean:.3f} ± {right.ci95:.3f} is not above chance"
    )
    for part in ("query", "support"):
        shuffled = estimate(scoring.evaluate(run, state, _Shuffled(run.test, part), 200))
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
    train_steps: int = STEPS,
    train_lr: float = LR,
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
