"""Check gradient-based methods against closed forms or independent computations, in float64."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian

from metalearn.algorithms.imaml import IMAML, conjugate_gradients
from metalearn.algorithms.maml import MAML
from metalearn.algorithms.maml_pp import MAMLPlusPlus
from metalearn.algorithms.meta_lstm import MetaLSTM
from metalearn.algorithms.meta_sgd import MetaSGD
from metalearn.algorithms.params import select
from metalearn.algorithms.proto_maml import ProtoMAML
from metalearn.algorithms.protonet import ProtoNet
from metalearn.algorithms.reptile import Reptile
from metalearn.backbones.mlp import MLP
from metalearn.tasks.types import State
from tests.one_task import (
    COMMON,
    GRADIENT,
    IDENTITY,
    KEY,
    NORMALISED,
    gradients,
    init_state,
    make_task,
    network,
    predictions,
)


def test_meta_sgd_gradient_of_a_rate_is_the_product_of_both_gradients():
    algorithm = MetaSGD(**COMMON, **(GRADIENT | {"inner_steps": 1}), inner_lr_max=0.5)
    task, state = make_task(), init_state(algorithm)
    rates = {name: value for name, value in state.params.items() if name.startswith("rate.")}
    assert all(
        value.min() >= 0.3 and value.max() <= 0.5 and value.std() > 0.01
        for value in rates.values()
        if value.numel() > 4
    )
    theta = {name: value for name, value in state.params.items() if name not in rates}
    support = grad(lambda p: F.cross_entropy(network(p, task.support.x), task.support.y))(theta)
    phi = {name: theta[name] - rates[f"rate.{name}"] * support[name] for name in theta}
    query = grad(lambda p: F.cross_entropy(network(p, task.query.x), task.query.y))(phi)
    meta_gradient = gradients(algorithm, state, task)
    for name in theta:
        torch.testing.assert_close(meta_gradient[f"rate.{name}"], -query[name] * support[name])


@pytest.mark.parametrize("kind", ["meta_sgd", "maml_pp"])
def test_first_order_still_learns_the_rates(kind):
    first: dict[str, Any] = GRADIENT | {"inner_steps": 1, "first_order": True}
    algorithm = (
        MetaSGD(**COMMON, **first, inner_lr_max=0.5)
        if kind == "meta_sgd"
        else maml_pp(**first, learned_rates=True)
    )
    task, state = make_task(), init_state(algorithm)
    theta = {name: value for name, value in state.params.items() if not name.startswith("rate.")}
    support = grad(lambda p: F.cross_entropy(network(p, task.support.x), task.support.y))(theta)
    phi = {name: theta[name] - state.params[f"rate.{name}"] * support[name] for name in theta}
    query = grad(lambda p: F.cross_entropy(network(p, task.query.x), task.query.y))(phi)
    meta_gradient = gradients(algorithm, state, task)
    for name in theta:
        product = -query[name] * support[name]
        torch.testing.assert_close(
            meta_gradient[f"rate.{name}"],
            product if kind == "meta_sgd" else product.sum().reshape(1),
        )
        torch.testing.assert_close(meta_gradient[name], query[name])


def maml_pp(**changes):
    off: dict[str, Any] = dict(
        multi_step_share=0.0,
        learned_rates=False,
        normalisation_per_step=False,
        first_order_share=0.0,
    )
    return MAMLPlusPlus(**(COMMON | GRADIENT | off | changes))


def test_maml_pp_without_its_switches_is_maml():
    plain, bare = MAML(**COMMON, **GRADIENT), maml_pp()
    task, state = make_task(), init_state(plain)
    torch.testing.assert_close(gradients(bare, state, task), gradients(plain, state, task))


def test_maml_pp_uses_the_learned_rate_of_each_step():
    algorithm = maml_pp(learned_rates=True)
    task, state = make_task(), init_state(algorithm)
    state.params["rate.head.weight"][:] = torch.tensor([0.1, 0.7]).double()
    theta = {name: value for name, value in state.params.items() if not name.startswith("rate.")}
    for step in range(2):
        gradient = grad(lambda p: F.cross_entropy(network(p, task.support.x), task.support.y))(
            theta
        )
        theta = {
            name: theta[name] - state.params[f"rate.{name}"][step] * gradient[name]
            for name in theta
        }
    torch.testing.assert_close(predictions(algorithm, state, task), network(theta, task.query.x))


def test_maml_pp_loss_is_a_weighted_sum_over_steps():
    algorithm = maml_pp(multi_step_share=0.5, inner_steps=3)
    start, end = (algorithm.step_weights(3, torch.tensor(progress)) for progress in (0.0, 0.5))
    torch.testing.assert_close(start, torch.full((3,), 1 / 3))
    torch.testing.assert_close(end, torch.tensor([0.01, 0.01, 0.98]))
    task, state = make_task(), init_state(algorithm)
    value = algorithm.loss(state, task, torch.tensor(0.25).double()).value
    losses = [
        F.cross_entropy(predictions(algorithm, state, task, steps=steps), task.query.y)
        for steps in (1, 2, 3)
    ]
    weights = algorithm.step_weights(3, torch.tensor(0.25).double())
    torch.testing.assert_close(value, (weights * torch.stack(losses)).sum())
    assert algorithm.stage(0.49) == algorithm
    later = algorithm.stage(0.5)
    torch.testing.assert_close(
        later.loss(state, task, torch.tensor(0.5).double()).value, losses[-1]
    )


def test_maml_pp_is_first_order_until_first_order_share():
    algorithm = maml_pp(first_order_share=0.5)
    task, state = make_task(), init_state(algorithm)
    first = gradients(MAML(**COMMON, **(GRADIENT | {"first_order": True})), state, task)
    second = gradients(MAML(**COMMON, **GRADIENT), state, task)
    torch.testing.assert_close(gradients(algorithm.stage(0.4), state, task), first)
    torch.testing.assert_close(gradients(algorithm.stage(0.5), state, task), second)
    assert not torch.allclose(first["head.weight"], second["head.weight"])


def test_maml_pp_normalisation_weights_belong_to_a_step():
    algorithm = maml_pp(backbone=NORMALISED, normalisation_per_step=True)
    task, state = make_task(), init_state(algorithm)
    assert state.params["step.net.norm0.weight"].shape == (2, 5)
    before = predictions(algorithm, state, task, steps=1)
    state.params["step.net.norm0.weight"][1] += 1
    torch.testing.assert_close(predictions(algorithm, state, task, steps=1), before)
    assert not torch.allclose(predictions(algorithm, state, task, steps=2), before)
    beyond = predictions(algorithm, state, task, steps=4)
    assert beyond.isfinite().all()


def test_maml_pp_adapting_only_the_head_embeds_with_the_weights_of_each_step():
    algorithm = maml_pp(backbone=NORMALISED, normalisation_per_step=True, adapted_part="head")
    task, state = make_task(), init_state(algorithm)
    state.params["step.net.norm0.weight"][1] += 1
    head = {name: value for name, value in state.params.items() if name.startswith("head.")}
    for step in range(2):
        params = algorithm.at_step(state.params, step)
        z = algorithm.embed(params, task.support.x, {})
        gradient = grad(lambda head, z=z: F.cross_entropy(algorithm.head(head, z), task.support.y))(
            head
        )
        head = {name: head[name] - 0.3 * gradient[name] for name in head}
    torch.testing.assert_close(
        predictions(algorithm, state, task),
        algorithm.head(head, algorithm.embed(params, task.query.x, {})),
    )


def test_maml_pp_adapts_only_the_normalisation_of_the_current_step():
    algorithm = maml_pp(backbone=NORMALISED, normalisation_per_step=True, adapt_normalisation=True)
    task, state = make_task(), init_state(algorithm)
    trajectory = algorithm.trajectory(state, task.support, KEY, 2)
    changes = [
        trajectory[step + 1]["step.net.norm0.weight"] - trajectory[step]["step.net.norm0.weight"]
        for step in range(2)
    ]
    for step in range(2):
        assert changes[step][step].abs().min() > 0
        assert not changes[step][1 - step].any()


def test_l2_maml_descends_the_regularised_loss():
    algorithm = MAML(**COMMON, **(GRADIENT | {"pull": 0.8}))
    task, state = make_task(), init_state(algorithm)
    theta = phi = state.params

    def inner(phi):
        squared_distance = sum((phi[name] - theta[name]).square().sum() for name in phi)
        return (
            F.cross_entropy(network(phi, task.support.x), task.support.y) + 0.4 * squared_distance
        )

    for _ in range(2):
        gradient = grad(inner)(phi)
        phi = {name: phi[name] - 0.3 * gradient[name] for name in phi}
    torch.testing.assert_close(predictions(algorithm, state, task), network(phi, task.query.x))


def test_boil_adapts_only_the_body():
    algorithm = MAML(**COMMON, **(GRADIENT | {"adapted_part": "body"}))
    task, state = make_task(), init_state(algorithm)
    params = algorithm.adapt(state, task.support, key=KEY).params
    assert all(
        torch.equal(params[name], state.params[name]) == name.startswith("head.") for name in params
    )


@pytest.mark.parametrize("temperature", [1.0, 7.0, None])
def test_proto_maml_without_steps_is_protonet(temperature):
    algorithm = ProtoMAML(**COMMON, **GRADIENT, temperature=temperature)
    metric = ProtoNet(**COMMON, distance="squared_euclidean", temperature=temperature)
    task, state = make_task(), init_state(algorithm)
    assert not any(name.startswith("head.") for name in state.params)
    torch.testing.assert_close(
        predictions(algorithm, state, task, steps=0).log_softmax(-1),
        predictions(metric, state, task).log_softmax(-1),
    )


def imaml(**settings):
    return IMAML(
        **COMMON, inner_lr=0.2, inner_steps=3, test_inner_steps=3, strength=2.0, **settings
    )


@pytest.mark.parametrize(("damping", "strength_damping"), [(0.0, 0.0), (0.5, 1.0)])
def test_imaml_gradient_solves_the_dense_system(damping, strength_damping):
    algorithm = imaml(cg_steps=60, damping=damping, strength_damping=strength_damping)
    task, state = make_task(), init_state(algorithm)
    phi = algorithm.solve(state, task.support, KEY, 3)
    names = list(phi)

    def tree(flat):
        parts = flat.split([phi[name].numel() for name in names])
        return {name: part.view(phi[name].shape) for name, part in zip(names, parts, strict=True)}

    def support_loss(flat):
        return F.cross_entropy(network(tree(flat), task.support.x), task.support.y)

    flat = torch.cat([phi[name].flatten() for name in names])
    matrix = (1 + damping) * torch.eye(len(flat), dtype=torch.float64)
    matrix += hessian(support_loss)(flat) / (algorithm.strength + strength_damping)
    query = grad(lambda flat: F.cross_entropy(network(tree(flat), task.query.x), task.query.y))(
        flat
    )
    expected = tree(torch.linalg.solve(matrix, query))
    torch.testing.assert_close(gradients(algorithm, state, task), expected, rtol=1e-6, atol=1e-9)


def test_imaml_reaches_the_regularised_minimum():
    algorithm = imaml(cg_steps=5, damping=1.0, strength_damping=0.0)
    task, state = make_task(), init_state(algorithm)
    phi = algorithm.solve(state, task.support, KEY, 300)
    slope = grad(algorithm.support_loss)(phi, task.support, {}, KEY)
    for name in phi:
        torch.testing.assert_close(
            slope[name], -2 * (phi[name] - state.params[name]), rtol=1e-6, atol=1e-8
        )


def test_conjugate_gradients_handle_a_zero_residual_and_zero_steps():
    zero = {"a": torch.zeros(3)}
    assert conjugate_gradients(lambda v: v, zero, 4)["a"].tolist() == [0, 0, 0]
    b = {"a": torch.tensor([1.0, 2.0])}
    assert conjugate_gradients(lambda v: v, b, 0) is b
    torch.testing.assert_close(conjugate_gradients(lambda v: v, b, 3), b)


class Frozen(MLP):
    is_frozen = True


IMAML_SETTINGS: dict[str, Any] = dict(strength=0.5, cg_steps=2, damping=0.0, strength_damping=0.0)
REPTILE_SETTINGS: dict[str, Any] = dict(
    inner_batch=3, test_inner_batch=3, inner_beta2=0.9, inner_eps=1e-8
)
STEPS: dict[str, Any] = {
    name: GRADIENT[name] for name in ("inner_lr", "inner_steps", "test_inner_steps")
}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (MAML, GRADIENT),
        (MAML, GRADIENT | {"adapted_part": "head"}),
        (MAML, GRADIENT | {"rematerialise": True}),
        (ProtoMAML, GRADIENT),
        (IMAML, STEPS | IMAML_SETTINGS),
        (Reptile, STEPS | REPTILE_SETTINGS),
    ],
)
def test_adaptation_uses_the_stored_statistics_of_a_frozen_backbone(method, settings):
    net = Frozen(hidden=[5], normalisation="batch", activation="tanh", eps=1e-5)
    frozen = method(**settings, backbone=net, statistics="population")
    bare = method(**settings, backbone=IDENTITY, statistics="query")
    task, state = make_task(), init_state(frozen)
    fixed = {name: value + 0.3 * torch.rand_like(value) for name, value in state.buffers.items()}
    state = State(state.params, fixed)

    def embed(part):
        z = net.embed(select(state.params, "net"), part.x, select(fixed, "net"))[0]
        return dataclasses.replace(part, x=z)

    embedded = dataclasses.replace(task, support=embed(task.support), query=embed(task.query))
    head_state = State(
        *({k: v for k, v in part.items() if "net." not in k} for part in (state.params, fixed))
    )
    torch.testing.assert_close(
        predictions(frozen, state, task), predictions(bare, head_state, embedded)
    )
    if head_state.params:
        expected = gradients(bare, head_state, embedded)
        actual = gradients(frozen, state, task)
        torch.testing.assert_close({name: actual[name] for name in expected}, expected)


@pytest.mark.parametrize("gate_inputs", ["gates", "logits"])
def test_meta_lstm_updates_each_weight_with_its_own_gates(gate_inputs):
    steps, hidden = 3, 4
    algorithm = MetaLSTM(
        **COMMON, hidden=hidden, inner_steps=steps, test_inner_steps=steps, input_bias=-1.0,
        forget_bias=2.0, gate_inputs=gate_inputs,
    )  # fmt: skip
    task, state = make_task(), init_state(algorithm)
    params = {name: value.clone().requires_grad_() for name, value in state.params.items()}
    meta = select(params, "meta")

    def preprocessed(x):
        if abs(x) >= math.exp(-10):
            return [math.log(abs(x)) / 10, math.copysign(1, x)]
        return [-1.0, math.exp(10) * x]

    def lstm(x, h, c):
        gates = meta["lstm.input"] @ x + meta["lstm.recurrent"] @ h + meta["lstm.bias"]
        i, f, g, o = gates.chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def gate(name, h, theta, before):
        inputs = torch.cat([h, theta[None], before[None]])
        return meta[f"{name}.weight"] @ inputs + meta[f"{name}.bias"]

    theta = {name: value for name, value in params.items() if not name.startswith("meta.")}
    zero = torch.zeros((), dtype=torch.float64)
    memory = {
        (name, place): (zero.expand(hidden), zero.expand(hidden), zero, zero)
        for name, value in theta.items()
        for place in range(value.numel())
    }
    for _ in range(steps):
        leaves = {name: value.detach().requires_grad_() for name, value in theta.items()}
        loss = F.cross_entropy(network(leaves, task.support.x), task.support.y)
        support = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        updated = {}
        for name, value in theta.items():
            places = []
            for place, (one, g) in enumerate(
                zip(value.flatten(), support[name].flatten(), strict=True)
            ):
                h, c, i, f = memory[name, place]
                x = torch.tensor(preprocessed(loss.item()) + preprocessed(g.item())).double()
                h, c = lstm(x, h, c)
                i, f = gate("input", h, one, i), gate("forget", h, one, f)
                places.append(f.sigmoid() * one - i.sigmoid() * g)
                if gate_inputs == "gates":
                    i, f = i.sigmoid(), f.sigmoid()
                memory[name, place] = (h, c, i, f)
            updated[name] = torch.stack(places).view(value.shape)
        theta = updated
    prediction = network(theta, task.query.x)
    torch.testing.assert_close(
        predictions(algorithm, state, task), prediction.detach(), rtol=1e-6, atol=1e-7
    )
    F.cross_entropy(prediction, task.query.y).backward()
    for name, value in gradients(algorithm, state, task).items():
        torch.testing.assert_close(value, params[name].grad, rtol=1e-5, atol=1e-8)
