"""Check methods against closed forms and independent slow computations, in float64."""

import dataclasses
from typing import Any

import pytest
import torch

from metalearn.algorithms.geometry import class_means, squared_distance
from metalearn.algorithms.maml import MAML
from metalearn.algorithms.protonet import ProtoNet
from metalearn.algorithms.reptile import Reptile
from metalearn.backbones.mlp import MLP
from metalearn.engine import Engine
from metalearn.tasks import prng
from metalearn.tasks.family import supervised
from metalearn.tasks.types import InputSpec, Query, Spec, State, Support, Task
from tests.fixtures import to_float64

_PROGRESS = torch.zeros(())
_IDENTITY = MLP(hidden=[], normalisation="none", activation="relu", eps=1e-5)


def maml(**changes):
    settings: dict[str, Any] = dict(
        backbone=_IDENTITY,
        statistics="query",
        inner_lr=0.1,
        inner_steps=1,
        test_inner_steps=1,
        first_order=False,
        adapted_part="all",
        adapt_normalisation=False,
        inner_loss="mean",
        pull=0.0,
    )
    return MAML(**(settings | changes))


def quadratic_task(seed: int = 0, examples: int = 6, features: int = 4):
    """Regression to zero without a bias: the loss is 1/2 theta' H theta with H = 2 X'X / M."""
    torch.manual_seed(seed)
    x = torch.randn(1, examples, features, dtype=torch.float64)
    x = torch.cat([x, -x], 1)  # so the bias and its gradient stay zero
    y = torch.zeros(1, 2 * examples, 1, dtype=torch.float64)
    hessian = 2 * x[0].T @ x[0] / (2 * examples)
    theta = torch.randn(1, features, dtype=torch.float64)
    state = State({"head.weight": theta, "head.bias": torch.zeros(1, dtype=torch.float64)}, {})
    return Task(Support(x, y, 1), Query(x, y), torch.zeros(1, dtype=torch.int64)), hessian, state


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("first_order", [False, True])
def test_maml_gradient_of_a_quadratic_has_a_closed_form(steps, first_order):
    task, hessian, state = quadratic_task()
    step = torch.eye(4, dtype=torch.float64) - 0.1 * hessian
    shrink = torch.linalg.matrix_power(step, steps)
    theta = state.params["head.weight"][0]
    expected = hessian @ shrink @ theta if first_order else shrink @ hessian @ shrink @ theta
    algorithm = maml(inner_steps=steps, first_order=first_order, family=supervised("value"))
    for strategy in ("vmap", "loop", "mixed"):
        gradients = Engine(algorithm, strategy, 1).step(state, task, _PROGRESS).gradients
        torch.testing.assert_close(gradients["head.weight"][0], expected, rtol=1e-12, atol=1e-12)


def test_maml_summed_inner_loss_equals_way_times_the_mean():
    torch.manual_seed(0)
    x, y = torch.randn(10, 3, dtype=torch.float64), torch.arange(10) % 5
    state = State(
        {
            "head.weight": torch.randn(5, 3, dtype=torch.float64),
            "head.bias": torch.zeros(5).double(),
        },
        {},
    )
    key = torch.tensor(0)
    summed = maml(inner_loss="sum", inner_lr=0.01).adapt(state, Support(x, y, 5), key=key)
    mean = maml(inner_lr=0.05).adapt(state, Support(x, y, 5), key=key)
    torch.testing.assert_close(summed.params, mean.params)


def test_anil_equals_gradient_descent_of_the_head_with_a_frozen_body():
    torch.manual_seed(0)
    net = MLP(hidden=[6], normalisation="none", activation="tanh", eps=1e-5)
    params, _ = net.init(InputSpec((3,)), torch.tensor(1))
    head = {"head.weight": torch.randn(2, 6), "head.bias": torch.zeros(2)}
    state = State({f"net.{name}": value for name, value in params.items()} | head, {})
    support = Support(torch.randn(8, 3), torch.arange(8) % 2, 2)
    learner = maml(backbone=net, adapted_part="head", inner_steps=2).adapt(
        state, support, key=torch.tensor(0), steps=2
    )
    z = net.embed(params, support.x)[0]
    weight, bias = (head[name].clone().requires_grad_() for name in ("head.weight", "head.bias"))
    optimiser = torch.optim.SGD([weight, bias], lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(z @ weight.T + bias, support.y).backward()
        optimiser.step()
    torch.testing.assert_close(learner.params["head.weight"], weight.detach())
    assert all(
        learner.params[name] is state.params[name]
        for name in state.params
        if name.startswith("net.")
    )


def test_reptile_direction_is_theta_minus_phi_with_adam_state_carried_across_tasks():
    torch.manual_seed(0)
    algorithm = Reptile(
        backbone=_IDENTITY,
        statistics="query",
        inner_lr=0.01,
        inner_steps=5,
        test_inner_steps=5,
        inner_batch=12,
        test_inner_batch=12,
        inner_beta2=0.99,
        inner_eps=1e-8,
    )
    state = to_float64(algorithm.init(Spec((3,), 3, 0, "class"), prng.key_of(0)))
    weight, bias = (
        state.params[name].clone().requires_grad_() for name in ("head.weight", "head.bias")
    )
    optimiser = torch.optim.Adam([weight, bias], lr=0.01, betas=(0.0, 0.99), eps=1e-8)
    for _ in range(3):
        x, y = torch.randn(1, 12, 3, dtype=torch.float64), torch.randint(3, (1, 12))
        task = Task(Support(x, y, 3), Query(x, y), torch.zeros(1, dtype=torch.int64))
        step = Engine(algorithm, "vmap", 1).step(state, task, _PROGRESS)
        for _ in range(5):  # batches are the support set, so their order does not matter
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(x[0] @ weight.T + bias, y[0]).backward()
            optimiser.step()
        torch.testing.assert_close(
            step.gradients["head.weight"], (state.params["head.weight"] - weight).detach()
        )
        torch.testing.assert_close(
            step.gradients["head.bias"], (state.params["head.bias"] - bias).detach()
        )
        meta = {name: value - step.gradients[name] for name, value in state.params.items()}
        assert step.statistics == {}
        state = State(meta, step.buffers)


def test_class_means_with_unequal_shots_and_squared_distances():
    z = torch.tensor([[0.0, 2.0], [4.0, 0.0], [2.0, 0.0]])
    means = class_means(z, torch.tensor([1, 0, 0]), 2)
    torch.testing.assert_close(means, torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
    torch.testing.assert_close(squared_distance(z, means), torch.cdist(z, means).square())
    with pytest.raises(ValueError, match="feature sizes differ: 2 and 3"):
        squared_distance(z, torch.zeros(1, 3))


@pytest.mark.parametrize("distance", ["squared_euclidean", "cosine"])
def test_protonet_without_a_temperature_does_not_depend_on_the_number_of_features(distance):
    algorithm = ProtoNet(
        backbone=_IDENTITY, statistics="query", distance=distance, temperature=None
    )
    torch.manual_seed(0)
    z, means = torch.randn(6, 8), torch.randn(3, 8)
    logits = algorithm.compare({}, means, z)
    torch.testing.assert_close(algorithm.compare({}, means.repeat(1, 9), z.repeat(1, 9)), logits)
    fixed = dataclasses.replace(algorithm, temperature=2.0 if distance != "cosine" else 0.1)
    torch.testing.assert_close(fixed.compare({}, means, z), logits)  # D / 4 for D = 8, and 0.1


def test_protonet_loss_is_cross_entropy_over_negative_squared_distances():
    algorithm = ProtoNet(
        backbone=_IDENTITY, statistics="query", distance="squared_euclidean", temperature=2.0
    )
    support = Support(torch.tensor([[0.0], [2.0]]), torch.tensor([0, 1]), 2)
    query = Query(torch.tensor([[0.5]]), torch.tensor([0]))
    loss = algorithm.loss(State({}, {}), Task(support, query, torch.tensor(0)), _PROGRESS)
    logits = torch.tensor([-(0.5**2) / 2, -(1.5**2) / 2])
    torch.testing.assert_close(loss.value, torch.logsumexp(logits, 0) - logits[0])
