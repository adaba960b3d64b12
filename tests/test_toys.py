"""The interface holds methods of other kinds, each in one class and with no change elsewhere."""

import dataclasses
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn import loop, random
from metalearn.algorithms.base import Algorithm, objective, prefixed, select
from metalearn.algorithms.linear_head import LinearHeadAlgorithm
from metalearn.algorithms.protonet import ProtoNet
from metalearn.engine import Engine
from metalearn.types import Labelled, Loss, Spec, State, Task
from tests.conftest import doubled


def network(algorithm, spec, key):
    params, population = algorithm.backbone.init(spec.input_shape, random.fold_in(key, 0))
    return prefixed(params, "net"), prefixed(population, "net")


class TransferToy(Algorithm):
    """Trains a linear layer over all training classes on ordinary batches; adapts by nearest class mean."""

    def init(self, spec, key):
        net, population = network(self, spec, key)
        size = math.prod(self.backbone.shape(spec.input_shape))
        net["global.weight"] = random.normal(random.fold_in(key, 1), (spec.train_classes, size)) * size**-0.5
        return State(net, population)

    def adapt(self, state, support, unlabelled=None, *, key, steps=None):
        z = self.backbone.embed(select(state.meta, "net"), support.x, select(state.fixed, "net"))[0]
        member = F.one_hot(support.y, support.way).to(z.dtype)
        return member.T @ z / member.sum(0)[:, None]

    def forward(self, state, learner, x, key):
        z, seen = self.embed_queries(state, select(state.meta, "net"), {}, x, key)
        return -torch.cdist(z, learner), seen

    def loss(self, state, task, progress):
        z, seen = self.embed_queries(state, select(state.meta, "net"), {}, task.query.x, True)
        logits = z @ state.meta["global.weight"].T
        return self.scored(objective(logits, task.query.y), logits, task.query.y, seen)


class MultiStepToy(LinearHeadAlgorithm):
    """A learned rate for each inner step, and a loss over the predictions after each of them (as MAML++)."""

    def init(self, spec, key):
        state = super().init(spec, key)
        return State(state.meta | {"inner_lr": torch.full((3,), 0.1, device=key.device)}, state.fixed)

    def trajectory(self, state, support, steps):
        theta = {name: value for name, value in state.meta.items() if name != "inner_lr"}
        for step in range(steps):
            yield theta

            def inner(params):
                return objective(
                    self.head(params, self.embed(params, support.x, self.own_statistics(state))), support.y
                )

            gradient = torch.func.grad(inner)(theta)
            theta = {name: theta[name] - state.meta["inner_lr"][step] * gradient[name] for name in theta}
        yield theta

    def adapt(self, state, support, unlabelled=None, *, key, steps=None):
        *_, last = self.trajectory(state, support, 3 if steps is None else steps)
        return self.adapted(last, support.x)

    def loss(self, state, task, progress):
        losses = [
            self.query_loss(state, self.adapted(theta, task.support.x), task.query, task.key)
            for theta in self.trajectory(state, task.support, 3)
        ]
        return Loss(torch.stack([loss.value for loss in losses]).mean(), losses[-1].logs, losses[-1].statistics)


class Memory(NamedTuple):
    hidden: Tensor


class SequenceToy(Algorithm):
    """A recurrent cell reads (embedding, label) pairs one by one; its last state is the learner."""

    targets = ("class",)
    fixed_way = True
    class_equivariant = False
    support_order_matters = True

    def init(self, spec, key):
        net, population = network(self, spec, key)
        size = math.prod(self.backbone.shape(spec.input_shape))
        for number, (name, rows) in enumerate({"cell": 16, "read": spec.way}.items()):
            columns = size + spec.way + 16 if name == "cell" else size + 16
            net[f"{name}.weight"] = random.normal(random.fold_in(key, number + 1), (rows, columns)) * columns**-0.5
        return State(net, population)

    def adapt(self, state, support, unlabelled=None, *, key, steps=None):
        z = self.backbone.embed(select(state.meta, "net"), support.x)[0]
        inputs = torch.cat([z, F.one_hot(support.y, support.way).to(z.dtype)], -1)
        hidden = torch.zeros_like(state.meta["cell.weight"][:, 0])
        for row in inputs:
            hidden = torch.tanh(state.meta["cell.weight"] @ torch.cat([row, hidden]))
        return Memory(hidden)

    def forward(self, state, learner, x, key):
        z, seen = self.embed_queries(state, select(state.meta, "net"), {}, x, key)
        hidden = learner.hidden.expand(len(z), -1)
        return torch.cat([z, hidden], -1) @ state.meta["read.weight"].T, seen


class RidgeToy(Algorithm):
    """Solves a linear system on the support set (as R2D2)."""

    def init(self, spec, key):
        net, population = network(self, spec, key)
        return State(net | {"log_lambda": torch.zeros((), device=key.device)}, population)

    def adapt(self, state, support, unlabelled=None, *, key, steps=None):
        z = self.backbone.embed(select(state.meta, "net"), support.x)[0]
        y = F.one_hot(support.y, support.way).to(z.dtype)
        gram = z @ z.T + state.meta["log_lambda"].exp() * torch.eye(len(z), dtype=z.dtype)
        return z.T @ torch.linalg.solve(gram, y)

    def forward(self, state, learner, x, key):
        z, seen = self.embed_queries(state, select(state.meta, "net"), {}, x, key)
        return z @ learner, seen


class UnlabelledToy(Algorithm):
    """Class means refined once by soft-assigned unlabelled pictures (as Ren et al. 2018)."""

    def init(self, spec, key):
        return State(*network(self, spec, key))

    def adapt(self, state, support, unlabelled=None, *, key, steps=None):
        net = select(state.meta, "net")
        z = self.backbone.embed(net, support.x)[0]
        member = F.one_hot(support.y, support.way).to(z.dtype)
        if unlabelled is not None:
            z_more = self.backbone.embed(net, unlabelled)[0]
            means = member.T @ z / member.sum(0)[:, None]
            z = torch.cat([z, z_more])
            member = torch.cat([member, (-torch.cdist(z_more, means).square()).softmax(-1)])
        return member.T @ z / member.sum(0)[:, None]

    def forward(self, state, learner, x, key):
        z, seen = self.embed_queries(state, select(state.meta, "net"), {}, x, key)
        return -torch.cdist(z, learner).square(), seen


TOYS = [TransferToy, MultiStepToy, SequenceToy, RidgeToy, UnlabelledToy]


def dress(task: Task, toy: type) -> Task:
    """The part of a task that only some methods use."""
    return dataclasses.replace(task, unlabelled=task.query.x.flip(1)) if toy is UnlabelledToy else task


@pytest.mark.parametrize("toy", TOYS)
def test_toy_goes_through_the_same_engine_and_loop(toy, make_run, tmp_path, monkeypatch):
    monkeypatch.setattr(ProtoNet, "sources", ("episodes", "batches"))  # which stands in until the toy takes its place
    source = "batches" if toy is TransferToy else "episodes"
    statistics = "population" if toy is TransferToy else "query"
    run = make_run(
        "algo=protonet", f"statistics={statistics}", f"train.source={source}", "train.batch_size=16", "train.steps=3"
    )
    algorithm = toy(backbone=run.algorithm.backbone, statistics=statistics)
    source_train, source_test = run.train, run.test

    @dataclasses.dataclass
    class Dressed:
        source: object

        def draw(self, first, count):
            return dress(self.source.draw(first, count), toy)

        def classes(self, first, count):
            return self.source.classes(first, count)

    spec_classes = 4 * 39 if source == "batches" else 0
    state = algorithm.init(Spec((1, 16, 16), 5, spec_classes, "class"), random.key_of(0))
    engine = Engine(algorithm, "vmap", 2)
    run = dataclasses.replace(
        run, algorithm=algorithm, state=state, train=Dressed(source_train), val=Dressed(source_test),
        test=Dressed(source_test), train_engine=engine, test_engine=engine,
    )  # fmt: skip

    class Positive(loop.Silent):
        def log(self, row):
            assert row["train.loss"] > 0

    before = {name: value.clone() for name, value in state.meta.items()}
    fitted = loop.fit(run, Positive(), tmp_path)
    moved = [name for name in before if not torch.equal(before[name], state.meta[name])]
    assert moved == list(before)
    assert loop.test(run, fitted.state, None).scores.shape == (6,)
    tasks, state = doubled(run.train.draw(0, 3)), doubled(state)
    progress = torch.zeros((), dtype=torch.float64)
    for strategy in ("loop", "mixed") if type(algorithm).loss is Algorithm.loss else ("loop",):
        torch.testing.assert_close(
            Engine(algorithm, strategy, 3).step(state, tasks, progress).gradients,
            Engine(algorithm, "vmap", 3).step(state, tasks, progress).gradients, rtol=1e-7, atol=1e-9,
        )  # fmt: skip


def test_labelled_is_a_pytree_with_a_static_way():
    part = Labelled(torch.zeros(3, 2), torch.zeros(3), 5)
    mapped = torch.func.vmap(lambda item: dataclasses.replace(item, x=item.x + item.way))(part)
    assert mapped.way == 5
    assert torch.equal(mapped.x, torch.full((3, 2), 5.0))
