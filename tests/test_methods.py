"""Check metric, memory and transfer methods against closed forms or slow loops, in float64."""

import dataclasses
from typing import Any

import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from torch.func import functional_call

from metalearn.algorithms.baseline import Baseline
from metalearn.algorithms.finetune import FineTuning
from metalearn.algorithms.geometry import class_means
from metalearn.algorithms.lstm import init_lstm, lstm_cell
from metalearn.algorithms.mapping import MappingNetwork
from metalearn.algorithms.matching import MatchingNetwork
from metalearn.algorithms.metanet import MetaNet
from metalearn.algorithms.params import select
from metalearn.algorithms.r2d2 import R2D2, ridge
from metalearn.algorithms.relation import RelationNetwork
from metalearn.algorithms.rfs import logistic_regression
from metalearn.algorithms.siamese import Siamese
from metalearn.backbones.conv4 import Conv4
from metalearn.tasks import prng
from metalearn.tasks.family import supervised
from metalearn.tasks.losses import LOSSES
from metalearn.tasks.types import Spec, State, Task
from tests.fixtures import to_float64
from tests.one_task import (
    COMMON,
    IDENTITY,
    KEY,
    NORMALISED,
    PROGRESS,
    gradients,
    init_state,
    make_task,
    network,
    predictions,
)


def test_lstm_cell_equals_torch():
    torch.manual_seed(0)
    weights = to_float64(init_lstm(prng.key_of(1), 3, 3))
    assert weights["bias"].tolist() == [0.0] * 3 + [1.0] * 3 + [0.0] * 6
    x, hidden, cell = (torch.randn(2, 3).double() for _ in range(3))
    reference = torch.nn.LSTMCell(3, 3).double()
    parameters = {
        "weight_ih": weights["input"],
        "weight_hh": weights["recurrent"],
        "bias_ih": weights["bias"],
    }
    parameters["bias_hh"] = torch.zeros(12).double()
    expected = functional_call(reference, parameters, (x, (hidden, cell)))
    torch.testing.assert_close(lstm_cell(weights, x, hidden, cell), expected)


def test_matching_is_attention_over_the_examples():
    algorithm = MatchingNetwork(
        **COMMON | {"backbone": IDENTITY}, temperature=0.5, full_context=False, processing_steps=1
    )
    task, state = make_task(), init_state(algorithm)
    expected = torch.zeros(12, 3).double()
    for row, query in enumerate(task.query.x):
        a = torch.stack([F.cosine_similarity(query, x, 0) / 0.5 for x in task.support.x]).softmax(0)
        for weight, y in zip(a, task.support.y, strict=True):
            expected[row, y] += weight
    torch.testing.assert_close(predictions(algorithm, state, task).exp(), expected)


def test_full_context_is_a_bidirectional_lstm_and_attention():
    algorithm = MatchingNetwork(**COMMON, temperature=1.0, full_context=True, processing_steps=2)
    task, state = make_task(), init_state(algorithm)
    assert algorithm.support_order_matters
    z = torch.randn(6, 5).double()
    reference = torch.nn.LSTM(5, 5, bidirectional=True).double()
    names = {"forward": "", "backward": "_reverse"}
    parameters = {}
    for part, suffix in names.items():
        parameters[f"weight_ih_l0{suffix}"] = state.params[f"{part}.input"]
        parameters[f"weight_hh_l0{suffix}"] = state.params[f"{part}.recurrent"]
        parameters[f"bias_ih_l0{suffix}"] = state.params[f"{part}.bias"]
        parameters[f"bias_hh_l0{suffix}"] = torch.zeros(20).double()
    output = functional_call(reference, parameters, (z[:, None],))[0][:, 0]
    torch.testing.assert_close(
        algorithm.embed_in_context(state.params, z), output[:, :5] + output[:, 5:] + z
    )
    for row, actual in zip(z, algorithm.attending(state.params, z, z), strict=True):
        hidden, memory = row, torch.zeros(5).double()
        for _ in range(2):
            read = (z @ hidden).softmax(0) @ z
            step = lstm_cell(
                select(state.params, "attend"),
                row[None],
                torch.cat([hidden, read])[None],
                memory[None],
            )
            hidden, memory = step[0][0] + row, step[1][0]
        torch.testing.assert_close(actual, hidden)
    assert all(value.abs().max() > 0 for value in gradients(algorithm, state, task).values())


@pytest.mark.parametrize("maps", [False, True])
def test_relation_network_equals_explicit_loops(maps):
    conv4 = Conv4(
        filters=3,
        blocks=1,
        halvings=0,
        downsample="pool",
        output="flatten",
        normalisation="none",
        activation="tanh",
        eps=1e-5,
    )
    algorithm = RelationNetwork(
        **COMMON | {"backbone": conv4 if maps else IDENTITY}, filters=5, hidden=[6]
    )
    task = make_task(features=50 if maps else 4)
    if maps:
        parts: Any = [
            dataclasses.replace(part, x=part.x.view(-1, 2, 5, 5))
            for part in (task.support, task.query)
        ]
        task = Task(parts[0], parts[1], KEY)
    state = to_float64(algorithm.init(Spec(task.query.x.shape[1:], 3, 0, "class"), prng.key_of(0)))
    meta, total = (
        {name: value + 0.1 for name, value in state.params.items()},
        torch.zeros(1).double(),
    )
    z = [
        conv4.embed(select(meta, "net"), part.x)[0].view(-1, 3, 5, 5)
        if maps
        else part.x[..., None, None]
        for part in (task.support, task.query)
    ]
    for x, y in zip(z[1], task.query.y, strict=True):
        for way in range(3):
            x_pair = torch.cat([z[0][task.support.y == way].sum(0), x])[None]
            for block in range(2):
                x_pair = F.conv2d(x_pair, meta[f"relation.conv{block}.weight"], padding="same")
                x_pair = (x_pair - x_pair.mean()) / (x_pair.var(correction=0) + 1e-5).sqrt()
                scale, shift = (
                    meta[f"relation.norm{block}.{part}"][:, None, None]
                    for part in ("weight", "bias")
                )
                x_pair = (scale * x_pair + shift).relu()
                x_pair = F.max_pool2d(x_pair, 2) if maps else x_pair
            hidden = (
                meta["relation.linear0.weight"] @ x_pair.flatten() + meta["relation.linear0.bias"]
            ).relu()
            relation = (
                meta["relation.linear1.weight"] @ hidden + meta["relation.linear1.bias"]
            ).sigmoid()
            total += (relation - float(way == y)) ** 2 / 36
    value = algorithm.loss(State(meta, state.buffers), task, PROGRESS).value
    torch.testing.assert_close(value, total.squeeze())


def test_siamese_equals_explicit_loops():
    algorithm = Siamese(**COMMON | {"backbone": IDENTITY})
    task, state = make_task(), init_state(algorithm)
    logits = torch.empty(12, 6).double()
    for row, x in enumerate(task.query.x):
        for column, other in enumerate(task.support.x):
            logits[row, column] = (
                state.params["pair.alpha"] @ (x - other).abs() + state.params["pair.bias"]
            )
    same = task.query.y[:, None] == task.support.y
    losses = torch.where(same, -F.logsigmoid(logits), -F.logsigmoid(-logits))
    torch.testing.assert_close(algorithm.loss(state, task, PROGRESS).value, losses.mean())
    expected = torch.stack(
        [logits[:, task.support.y == way].max(-1).values for way in range(3)], -1
    )
    torch.testing.assert_close(predictions(algorithm, state, task), expected)


def test_ridge_regression_solves_the_normal_equations():
    torch.manual_seed(0)
    z, y, strength = (
        torch.randn(6, 4).double(),
        torch.randn(6, 3).double(),
        torch.tensor(0.7).double(),
    )
    normal = torch.linalg.solve(z.T @ z + strength * torch.eye(4).double(), z.T @ y)
    torch.testing.assert_close(ridge(z, y, strength), normal)


def test_r2d2_scales_a_ridge_regression_of_the_labels():
    algorithm = R2D2(**COMMON | {"backbone": IDENTITY}, strength=0.5, scale=3.0)
    task, state = make_task(), init_state(algorithm)
    z, new = (F.pad(part.x, (0, 1), value=1.0) for part in (task.support, task.query))
    y = F.one_hot(task.support.y, 3).double()
    weight = torch.linalg.solve(
        z.T @ z / len(z) + 0.5 * torch.eye(5).double(), z.T @ y / len(z)
    )  # mean squared error
    torch.testing.assert_close(predictions(algorithm, state, task), 3 * new @ weight)


def test_mapping_predicts_weight_and_bias_of_each_class():
    algorithm = MappingNetwork(**COMMON | {"backbone": IDENTITY}, hidden=[6])
    task, state = make_task(), init_state(algorithm)
    meta = state.params
    for way in range(3):
        mean = task.support.x[task.support.y == way].mean(0)
        hidden = F.leaky_relu(meta["map0.weight"] @ mean + meta["map0.bias"])
        weight = meta["map1.weight"] @ hidden + meta["map1.bias"]
        expected = (task.query.x @ (weight[:4] + mean) + weight[4]) / 2
        torch.testing.assert_close(predictions(algorithm, state, task)[:, way], expected)


@pytest.mark.parametrize("second_order", [True, False])
def test_metanet_reads_fast_weights_for_each_query(second_order):
    algorithm = MetaNet(
        **COMMON | {"backbone": IDENTITY},
        hidden=6,
        representation=5,
        meta_hidden=7,
        second_order=second_order,
    )
    task, state = make_task(), init_state(algorithm)
    meta = state.params | state.buffers
    memory = algorithm.learn(meta, task.support.x, task.support, KEY)
    for row, x in enumerate(task.query.x):
        r = meta["represent.layer"] @ x + memory.representation @ x
        a = torch.stack([F.cosine_similarity(r, key, 0) for key in memory.keys]).softmax(0)
        hidden, output = (
            sum(w * f for w, f in zip(a, memory.fast[part], strict=True))
            for part in ("hidden", "output")
        )
        h = (meta["base.hidden"] @ x).relu() + (hidden @ x).relu()
        expected = meta["base.output"] @ h + output @ h
        torch.testing.assert_close(predictions(algorithm, state, task)[row], expected)
    # The fast weights of an example depend only on the gradient of its own loss.
    other = dataclasses.replace(
        task.support, y=torch.cat([task.support.y[:1], task.support.y[1:].flip(0)])
    )
    changed = algorithm.learn(meta, task.support.x, other, KEY)
    torch.testing.assert_close(changed.fast["hidden"][0], memory.fast["hidden"][0])
    meta_gradient = gradients(algorithm, state, task)
    assert all(value.abs().max() > 0 for value in meta_gradient.values())
    # Without second order, no gradient reaches this weight, so it is not a meta-parameter.
    assert ("represent.output" in meta_gradient) == second_order


def baseline(**changes):
    settings: dict[str, Any] = dict(
        head="linear",
        train_scale=3.0,
        head_scale=4.0,
        head_steps=7,
        head_lr=0.3,
        head_momentum=0.9,
        head_decay=0.01,
    )
    return Baseline(**(COMMON | {"backbone": IDENTITY, "source": "batches"} | settings | changes))


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_baseline_head_matches_torch_sgd(head):
    algorithm = baseline(head=head)
    task, state = make_task(), init_state(algorithm, classes=20)
    start = baseline(head=head, head_steps=0).adapt(state, task.support, key=KEY).head
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimiser = torch.optim.SGD(
        leaves.values(), lr=0.3, momentum=0.9, dampening=0.9, weight_decay=0.01
    )

    def logits(x):
        if head == "linear":
            return x @ leaves["weight"].T + leaves["bias"]
        return 4 * F.cosine_similarity(x[:, None], leaves["weight"][None], dim=-1)

    for _ in range(7):
        optimiser.zero_grad()
        F.cross_entropy(logits(task.support.x), task.support.y).backward()
        optimiser.step()
    torch.testing.assert_close(predictions(algorithm, state, task), logits(task.query.x).detach())


def test_logistic_regression_reaches_the_minimum():
    task = make_task(shot=4)
    z = F.normalize(task.support.x, dim=-1)

    def objective(flat):
        weight = torch.tensor(flat).view(5, 3).requires_grad_()
        value = weight[:-1].square().sum() / 2
        value = value + 1.5 * F.cross_entropy(
            F.pad(z, (0, 1), value=1.0) @ weight, task.support.y, reduction="sum"
        )
        value.backward()
        assert weight.grad is not None
        return value.item(), weight.grad.flatten().numpy()

    best = scipy.optimize.minimize(
        objective, torch.zeros(15).double().numpy(), jac=True, tol=1e-12, method="BFGS"
    )
    weight = logistic_regression(z, task.support.y, 3, 1.5, 300)
    # The biases are determined up to a constant.
    expected = torch.tensor(best.x).view(5, 3)
    torch.testing.assert_close(weight[:-1], expected[:-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        weight[-1] - weight[-1].mean(), expected[-1] - expected[-1].mean(), rtol=1e-4, atol=1e-5
    )


def test_baseline_pp_learns_a_norm_for_each_training_class():
    algorithm = baseline(head="cosine")
    task, state = make_task(), init_state(algorithm, classes=20)
    z, weight = task.query.x, state.params["global.weight"]
    cosines = F.cosine_similarity(z[:, None], weight[None], dim=-1)
    torch.testing.assert_close(
        algorithm.classify(state.params, z), 3 * cosines * weight.norm(dim=1)
    )


def test_fine_tuning_with_population_statistics_treats_examples_independently():
    net: dict[str, Any] = {"backbone": NORMALISED, "statistics": "population"}
    algorithm = FineTuning(**COMMON | net, inner_lr=0.2, test_inner_steps=3)
    task, state = make_task(), init_state(algorithm, classes=20)

    def head_after_a_step(x, y):
        support = dataclasses.replace(task.support, x=x, y=y)
        return algorithm.adapt(state, support, key=KEY, steps=1).params["head.weight"]

    pairs = zip(task.support.x.split(1), task.support.y.split(1), strict=True)
    mean = torch.stack([head_after_a_step(x, y) for x, y in pairs]).mean(0)
    torch.testing.assert_close(head_after_a_step(task.support.x, task.support.y), mean)


@pytest.mark.parametrize("target", ["class", "value"])
def test_fine_tuning_matches_torch_sgd_from_the_trained_weights(target):
    """Classes get a new head; values use the trained head."""
    algorithm = FineTuning(**COMMON, inner_lr=0.2, test_inner_steps=3, family=supervised(target))
    task = make_task()
    loss = LOSSES[target]["cross_entropy" if target == "class" else "squared_error"]
    if target == "class":
        state = init_state(algorithm, classes=20)
        head = {"head.weight": torch.zeros(3, 5).double(), "head.bias": torch.zeros(3).double()}
    else:
        values = dataclasses.replace(task.support, y=task.support.x[:, :2].sin())
        task = dataclasses.replace(task, support=values)
        state = to_float64(algorithm.init(Spec((4,), 2, 0, "value"), prng.key_of(0)))
        head = {f"head.{name}": state.params[f"global.{name}"] for name in ("weight", "bias")}
    params = {name: value for name, value in state.params.items() if name.startswith("net.")} | head
    params = {name: value.clone().requires_grad_() for name, value in params.items()}
    optimiser = torch.optim.SGD(params.values(), lr=0.2)
    for _ in range(3):
        optimiser.zero_grad()
        loss(network(params, task.support.x), task.support.y).backward()
        optimiser.step()
    torch.testing.assert_close(
        predictions(algorithm, state, task), network(params, task.query.x).detach()
    )


def test_class_sums_and_means_agree():
    task = make_task(shot=5)
    means = class_means(task.support.x, task.support.y, 3)
    torch.testing.assert_close(means[1], task.support.x[task.support.y == 1].mean(0))
