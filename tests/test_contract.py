"""One contract for every method, found by listing conf/algo."""

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console
from torch.utils import _pytree as pytree

from metalearn import load, loop, random
from metalearn.algorithms.base import Algorithm
from metalearn.engine import Engine
from metalearn.stats import estimate
from metalearn.types import Labelled, Spec, Task
from metalearn.verbs.compare import compare
from metalearn.verbs.evaluate import evaluate
from metalearn.verbs.train import train
from tests.conftest import ALGORITHMS, doubled

pytestmark = pytest.mark.parametrize("name", ALGORITHMS)
_HALF = torch.tensor(0.5)
STATISTICS = [
    "query", *(pytest.param(name, marks=pytest.mark.slow) for name in ("support", "support_plus_one", "population"))
]  # fmt: skip


def permuted_classes(task: Task, order: torch.Tensor) -> Task:
    def relabelled(part: Labelled) -> Labelled:
        return dataclasses.replace(part, y=order[part.y])

    return dataclasses.replace(task, support=relabelled(task.support), query=relabelled(task.query))


class Shuffled:
    """Tasks whose query labels, or whose support labels, are shuffled: nothing can be learned."""

    def __init__(self, source, part):
        self.source, self.part = source, part

    def draw(self, first, count):
        task = self.source.draw(first, count)
        labelled = getattr(task, self.part)
        order = random.permutation(random.fold_in(task.key, 77), labelled.y.shape[1])
        changed = dataclasses.replace(labelled, y=labelled.y.gather(1, order))
        return dataclasses.replace(task, **{self.part: changed})


@pytest.mark.parametrize("statistics", STATISTICS)
def test_strategies_agree(name, statistics, make_run):
    maps = ["backbone.halvings=2"] if statistics == "population" else []  # elsewhere of one position
    run = make_run(f"algo={name}", f"statistics={statistics}", "train.meta_batch=4", "episode.train.way=5", *maps)
    tasks, state = doubled(run.train.draw(0, 4)), doubled(run.state)
    steps = {
        (strategy, chunk): Engine(run.algorithm, strategy, chunk).at(0.5).step(state, tasks, _HALF.double())
        for strategy, chunk in [("vmap", 4), ("vmap", 3), ("loop", 1), ("mixed", 2)]
        if strategy != "mixed" or type(run.algorithm).loss is Algorithm.loss
    }
    first = steps.pop(("vmap", 4))
    for other in steps.values():
        torch.testing.assert_close(other.gradients, first.gradients, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(other.statistics, first.statistics, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(other.logs["loss"], first.logs["loss"], rtol=1e-7, atol=1e-9)
    tasks = doubled(run.test.draw(0, 4))
    predictions = [Engine(run.algorithm, s, 2).predictions(state, tasks) for s in ("vmap", "loop", "mixed")]
    for other in predictions[1:]:
        torch.testing.assert_close(other, predictions[0], rtol=1e-7, atol=1e-9)


def test_gradients_are_finite_and_reach_every_meta_parameter(name, make_run):
    run = make_run(f"algo={name}", "train.meta_batch=4")
    gradients = run.train_engine.at(0.5).step(run.state, run.train.draw(0, 4), _HALF).gradients
    assert gradients.keys() == run.state.meta.keys()
    for key, value in gradients.items():
        assert value.isfinite().all(), key
        assert value.abs().max() > 1e-9, f"{key} gets no gradient"


@pytest.mark.slow
def test_same_seed_same_result(name, make_run):
    def first_step(seed):
        run = make_run(f"algo={name}", f"seed={seed}")
        return run.train_engine.at(0.5).step(run.state, run.train.draw(0, 2), _HALF).gradients

    first, again, other = first_step(3), first_step(3), first_step(4)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


_trained: dict[str, tuple] = {}


@pytest.fixture
def trained(make_run, tmp_path_factory):
    """A run on easy classes and its state after a little training, made once for each method."""

    def made(name):
        if name not in _trained:
            quick = ["train.steps=40", "val.every=40", "test.episodes=100", "dataset.jitter=0.2", "train.meta_batch=4"]
            run = make_run(f"algo={name}", *quick, *usual_rate(make_run, f"algo={name}"))
            _trained[name] = run, loop.fit(run, loop.Silent(), tmp_path_factory.mktemp(name)).state
        return _trained[name]

    return made


def usual_rate(make_run, *words):
    """A rate for short trainings, where the meta-optimiser is Adam."""
    return ["train.lr=0.01"] if make_run(*words).config.train.optimiser == "adam" else []


@pytest.mark.slow
def test_beats_chance_on_separable_classes_but_not_on_shuffled_labels(name, trained):
    run, state = trained(name)
    found = estimate(loop.test(run, state, None).scores)
    assert found.mean - 3 * found.ci95 > 0.2
    for part in ("query", "support"):
        shuffled = estimate(loop.evaluate(run, state, Shuffled(run.test, part), 400))
        assert abs(shuffled.mean - 0.2) < 1.5 * shuffled.ci95, part


@pytest.mark.slow
def test_labels_of_the_support_are_learned_from(name, trained):
    run, state = trained(name)
    task = run.test.draw(0, 30)
    wrong = dataclasses.replace(task, support=dataclasses.replace(task.support, y=(task.support.y + 1) % 5))
    right, misled = (run.test_engine.scores(state, t, run.score).mean() for t in (task, wrong))
    assert misled < right - 0.1


@pytest.mark.slow
def test_training_improves(name, make_run, tmp_path):
    hard = [f"algo={name}", "dataset.jitter=1.5", "backbone.filters=16", "episode.query=5", "val.episodes=100"]
    quick = ["train.steps=160", "val.every=160", "train.meta_batch=4"]
    run = make_run(*hard, *quick, *usual_rate(make_run, *hard))
    before = estimate(loop.evaluate(run, run.state, run.val, 100))

    fitted = loop.fit(run, loop.Silent(), tmp_path)
    assert fitted.best_val.mean > before.mean + before.ci95


@pytest.mark.parametrize("statistics", STATISTICS)
def test_inductive_predictions_do_not_depend_on_the_other_queries(name, statistics, make_run):
    run = make_run(f"algo={name}", f"statistics={statistics}")
    task = pytree.tree_map(lambda leaf: leaf[0], doubled(run.test.draw(0, 1)))
    state = doubled(run.state)
    learner = run.algorithm.adapt(state, task.support, key=task.key)
    together = run.algorithm.predict(state, learner, task.query.x)
    apart = torch.cat([run.algorithm.predict(state, learner, x) for x in task.query.x.split(5)])
    assert torch.allclose(together, apart) == (statistics != "query")


def test_declared_symmetries_hold(name, make_run):
    run = make_run(f"algo={name}", "episode.shot=2")
    task, state = doubled(run.test.draw(0, 3)), doubled(run.state)
    engine = Engine(run.algorithm, "vmap", 3)
    before = engine.predictions(state, task)

    order = torch.tensor([2, 0, 1, 4, 3])
    after = engine.predictions(state, permuted_classes(task, order))
    assert torch.allclose(after[..., order], before, rtol=1e-6, atol=1e-8) == run.algorithm.class_equivariant

    place = torch.arange(10).flip(0)
    moved = Labelled(task.support.x[:, place], task.support.y[:, place], task.support.way)
    after = engine.predictions(state, dataclasses.replace(task, support=moved))
    same = torch.allclose(after, before, rtol=1e-6, atol=1e-8)
    assert same == (not run.algorithm.support_order_matters)


def test_initial_state_has_no_bias_before_a_normalisation(name, make_run):
    run = make_run(f"algo={name}")
    spec = Spec((1, 16, 16), 5, 100, "class")
    state = run.algorithm.init(spec, random.key_of(0))
    assert not any(key.startswith("net.conv") and key.endswith("bias") for key in state.meta)


@pytest.mark.slow
def test_goes_through_every_verb(name, compose, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    words = [f"algo={name}", "train.batch_size=16"]
    folders = [tmp_path / str(seed) for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        train(compose(*words, f"seed={seed}"), folder, f"{name} glyphs", words, console)
    evaluate(folders[0], [], "test", None, console)
    own = json.loads((folders[0] / "result.json").read_text())
    again = json.loads((folders[0] / f"evaluations/{own['protocol_id']}.json").read_text())
    assert again["test"] == own["test"]
    compare(folders, tmp_path / "compared", console)
    assert f"{name} glyphs" in (tmp_path / "compared/comparison.md").read_text()
    model = load(folders[0])
    pictures = torch.rand(10, *model.spec.input_shape)
    found = model.adapt(pictures, [f"class {number % 5}" for number in range(10)]).predict(pictures)
    assert set(found) <= set(model.classes) == {f"class {number}" for number in range(5)}
