"""Each method against a closed form or an independent slow computation, in float64."""

import dataclasses

import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, hessian

from metalearn import random
from metalearn.algorithms.base import select
from metalearn.algorithms.baseline import Baseline
from metalearn.algorithms.finetune import FineTuning
from metalearn.algorithms.geometry import class_means
from metalearn.algorithms.imaml import IMAML, conjugate_gradients
from metalearn.algorithms.lstm import init_lstm, lstm_cell
from metalearn.algorithms.maml import MAML
from metalearn.algorithms.maml_pp import MAMLPlusPlus
from metalearn.algorithms.mapping import MappingNetwork
from metalearn.algorithms.matching import MatchingNetwork
from metalearn.algorithms.meta_sgd import MetaSGD
from metalearn.algorithms.metanet import MetaNet
from metalearn.algorithms.proto_maml import ProtoMAML
from metalearn.algorithms.protonet import ProtoNet
from metalearn.algorithms.r2d2 import R2D2, ridge
from metalearn.algorithms.relation import RelationNetwork
from metalearn.algorithms.rfs import logistic_regression
from metalearn.algorithms.siamese import Siamese
from metalearn.backbones.conv4 import Conv4
from metalearn.backbones.mlp import MLP
from metalearn.engine import Engine
from metalearn.types import Labelled, Spec, State, Task
from tests.conftest import doubled

_IDENTITY = MLP(hidden=[], normalisation="none", activation="relu", eps=1e-5)
_NET = MLP(hidden=[5], normalisation="none", activation="tanh", eps=1e-5)
_NORMALISED = MLP(hidden=[5], normalisation="batch", activation="tanh", eps=1e-5)
_COMMON = dict(backbone=_NET, statistics="query")
_GRADIENT = dict(
    inner_lr=0.3, inner_steps=2, test_inner_steps=2, first_order=False, adapted_part="all", pull=0.0,
    adapt_normalisation=False, inner_loss="mean",
)  # fmt: skip
_KEY = torch.zeros((), dtype=torch.int64)
_PROGRESS = torch.zeros((), dtype=torch.float64)


def task(shot=2, way=3, query=4, features=4, seed=0):
    torch.manual_seed(seed)
    parts = []
    for each in (shot, query):
        y = torch.arange(way).repeat(each)
        parts.append(Labelled(torch.randn(way * each, features).double() + F.one_hot(y, features), y, way))
    return Task(parts[0], parts[1], _KEY)


def state_of(algorithm, way=3, features=4, classes=0):
    return doubled(algorithm.init(Spec((features,), way, classes, "class"), random.key_of(0)))


def batched(one):
    return torch.utils._pytree.tree_map(lambda leaf: leaf[None], one)


def gradients(algorithm, state, one, progress=_PROGRESS):
    return Engine(algorithm, "loop", 1).step(state, batched(one), progress).gradients


def predictions(algorithm, state, one, **options):
    return algorithm.predict(state, algorithm.adapt(state, one.support, key=_KEY, **options), one.query.x)


def network(params, x):
    z = torch.tanh(x @ params["net.linear0.weight"].T + params["net.linear0.bias"])
    return z @ params["head.weight"].T + params["head.bias"]


def test_meta_sgd_gradient_of_a_rate_is_the_product_of_both_gradients():
    algorithm = MetaSGD(**_COMMON, **(_GRADIENT | {"inner_steps": 1}), inner_lr_max=0.5)
    one, state = task(), state_of(algorithm)
    rates = {name: value for name, value in state.meta.items() if name.startswith("rate.")}
    assert all(
        value.min() >= 0.3 and value.max() <= 0.5 and value.std() > 0.01
        for value in rates.values()
        if value.numel() > 4
    )
    theta = {name: value for name, value in state.meta.items() if name not in rates}
    support = grad(lambda p: F.cross_entropy(network(p, one.support.x), one.support.y))(theta)
    phi = {name: theta[name] - rates[f"rate.{name}"] * support[name] for name in theta}
    query = grad(lambda p: F.cross_entropy(network(p, one.query.x), one.query.y))(phi)
    found = gradients(algorithm, state, one)
    for name in theta:
        torch.testing.assert_close(found[f"rate.{name}"], -query[name] * support[name])


@pytest.mark.parametrize("kind", ["meta_sgd", "maml_pp"])
def test_first_order_still_learns_the_rates(kind):
    first = _GRADIENT | {"inner_steps": 1, "first_order": True}
    algorithm = (
        MetaSGD(**_COMMON, **first, inner_lr_max=0.5) if kind == "meta_sgd" else plus_plus(**first, learned_rates=True)
    )
    one, state = task(), state_of(algorithm)
    theta = {name: value for name, value in state.meta.items() if not name.startswith("rate.")}
    support = grad(lambda p: F.cross_entropy(network(p, one.support.x), one.support.y))(theta)
    phi = {name: theta[name] - state.meta[f"rate.{name}"] * support[name] for name in theta}
    query = grad(lambda p: F.cross_entropy(network(p, one.query.x), one.query.y))(phi)
    found = gradients(algorithm, state, one)
    for name in theta:
        each = -query[name] * support[name]
        torch.testing.assert_close(found[f"rate.{name}"], each if kind == "meta_sgd" else each.sum().reshape(1))
        torch.testing.assert_close(found[name], query[name])


def plus_plus(**changes):
    off = dict(multi_step_share=0.0, learned_rates=False, normalisation_per_step=False, first_order_share=0.0)
    return MAMLPlusPlus(**(_COMMON | _GRADIENT | off | changes))


def test_maml_pp_without_its_switches_is_maml():
    plain, bare = MAML(**_COMMON, **_GRADIENT), plus_plus()
    one, state = task(), state_of(plain)
    torch.testing.assert_close(gradients(bare, state, one), gradients(plain, state, one))


def test_maml_pp_rates_of_each_step():
    algorithm = plus_plus(learned_rates=True)
    one, state = task(), state_of(algorithm)
    state.meta["rate.head.weight"][:] = torch.tensor([0.1, 0.7]).double()
    theta = {name: value for name, value in state.meta.items() if not name.startswith("rate.")}
    for step in range(2):
        gradient = grad(lambda p: F.cross_entropy(network(p, one.support.x), one.support.y))(theta)
        theta = {name: theta[name] - state.meta[f"rate.{name}"][step] * gradient[name] for name in theta}
    torch.testing.assert_close(predictions(algorithm, state, one), network(theta, one.query.x))


def test_maml_pp_losses_of_each_step():
    algorithm = plus_plus(multi_step_share=0.5, inner_steps=3)
    start, end = (algorithm.step_weights(3, torch.tensor(progress)) for progress in (0.0, 0.5))
    torch.testing.assert_close(start, torch.full((3,), 1 / 3))
    torch.testing.assert_close(end, torch.tensor([0.01, 0.01, 0.98]))
    one, state = task(), state_of(algorithm)
    value = algorithm.loss(state, one, torch.tensor(0.25).double()).value
    each = [F.cross_entropy(predictions(algorithm, state, one, steps=steps), one.query.y) for steps in (1, 2, 3)]
    weights = algorithm.step_weights(3, torch.tensor(0.25).double())
    torch.testing.assert_close(value, (weights * torch.stack(each)).sum())
    assert algorithm.stage(0.49) == algorithm
    later = algorithm.stage(0.5)
    torch.testing.assert_close(later.loss(state, one, torch.tensor(0.5).double()).value, each[-1])


def test_maml_pp_drops_second_derivatives_at_first():
    algorithm = plus_plus(first_order_share=0.5)
    one, state = task(), state_of(algorithm)
    first = gradients(MAML(**_COMMON, **(_GRADIENT | {"first_order": True})), state, one)
    second = gradients(MAML(**_COMMON, **_GRADIENT), state, one)
    torch.testing.assert_close(gradients(algorithm.stage(0.4), state, one), first)
    torch.testing.assert_close(gradients(algorithm.stage(0.5), state, one), second)
    assert not torch.allclose(first["head.weight"], second["head.weight"])


def test_maml_pp_normalisation_weights_belong_to_a_step():
    algorithm = plus_plus(backbone=_NORMALISED, normalisation_per_step=True)
    one, state = task(), state_of(algorithm)
    assert state.meta["step.net.norm0.weight"].shape == (2, 5)
    before = predictions(algorithm, state, one, steps=1)
    state.meta["step.net.norm0.weight"][1] += 1
    torch.testing.assert_close(predictions(algorithm, state, one, steps=1), before)
    assert not torch.allclose(predictions(algorithm, state, one, steps=2), before)
    beyond = predictions(algorithm, state, one, steps=4)
    assert beyond.isfinite().all()


def test_maml_pp_head_alone_embeds_with_the_weights_of_each_step():
    algorithm = plus_plus(backbone=_NORMALISED, normalisation_per_step=True, adapted_part="head")
    one, state = task(), state_of(algorithm)
    state.meta["step.net.norm0.weight"][1] += 1
    head = {name: value for name, value in state.meta.items() if name.startswith("head.")}
    for step in range(2):
        params = algorithm.at_step(state.meta, step)
        z = algorithm.embed(params, one.support.x)
        gradient = grad(lambda head, z=z: F.cross_entropy(algorithm.head(head, z), one.support.y))(head)
        head = {name: head[name] - 0.3 * gradient[name] for name in head}
    torch.testing.assert_close(
        predictions(algorithm, state, one), algorithm.head(head, algorithm.embed(params, one.query.x))
    )


def test_maml_pp_adapts_the_normalisation_of_a_step():
    algorithm = plus_plus(backbone=_NORMALISED, normalisation_per_step=True, adapt_normalisation=True)
    one, state = task(), state_of(algorithm)
    after = algorithm.trajectory(state.meta, one.support, 2)
    moved = [after[step + 1]["step.net.norm0.weight"] - after[step]["step.net.norm0.weight"] for step in range(2)]
    for step in range(2):
        assert moved[step][step].abs().min() > 0
        assert not moved[step][1 - step].any()


def test_l2_maml_descends_the_regularised_loss():
    algorithm = MAML(**_COMMON, **(_GRADIENT | {"pull": 0.8}))
    one, state = task(), state_of(algorithm)
    theta = phi = state.meta

    def inner(phi):
        away = sum((phi[name] - theta[name]).square().sum() for name in phi)
        return F.cross_entropy(network(phi, one.support.x), one.support.y) + 0.4 * away

    for _ in range(2):
        gradient = grad(inner)(phi)
        phi = {name: phi[name] - 0.3 * gradient[name] for name in phi}
    torch.testing.assert_close(predictions(algorithm, state, one), network(phi, one.query.x))


def test_boil_changes_the_body_alone():
    algorithm = MAML(**_COMMON, **(_GRADIENT | {"adapted_part": "body"}))
    one, state = task(), state_of(algorithm)
    params = algorithm.adapt(state, one.support, key=_KEY).params
    assert all(torch.equal(params[name], state.meta[name]) == name.startswith("head.") for name in params)


def test_proto_maml_without_steps_is_protonet():
    algorithm = ProtoMAML(**_COMMON, **_GRADIENT)
    metric = ProtoNet(**_COMMON, distance="squared_euclidean", temperature=1.0)
    one, state = task(), state_of(algorithm)
    assert not any(name.startswith("head.") for name in state.meta)
    torch.testing.assert_close(
        predictions(algorithm, state, one, steps=0).log_softmax(-1), predictions(metric, state, one).log_softmax(-1)
    )


def imaml(**settings):
    return IMAML(**_COMMON, inner_lr=0.2, inner_steps=3, test_inner_steps=3, strength=2.0, **settings)


@pytest.mark.parametrize(("damping", "strength_damping"), [(0.0, 0.0), (0.5, 1.0)])
def test_imaml_solves_the_dense_system(damping, strength_damping):
    algorithm = imaml(cg_steps=60, damping=damping, strength_damping=strength_damping)
    one, state = task(), state_of(algorithm)
    phi = algorithm.solved(state.meta, one.support, 3)
    names = list(phi)

    def tree(flat):
        parts = flat.split([phi[name].numel() for name in names])
        return {name: part.view(phi[name].shape) for name, part in zip(names, parts, strict=True)}

    def support_loss(flat):
        return F.cross_entropy(network(tree(flat), one.support.x), one.support.y)

    flat = torch.cat([phi[name].flatten() for name in names])
    matrix = (1 + damping) * torch.eye(len(flat), dtype=torch.float64)
    matrix += hessian(support_loss)(flat) / (algorithm.strength + strength_damping)
    query = grad(lambda flat: F.cross_entropy(network(tree(flat), one.query.x), one.query.y))(flat)
    expected = tree(torch.linalg.solve(matrix, query))
    torch.testing.assert_close(gradients(algorithm, state, one), expected, rtol=1e-6, atol=1e-9)


def test_imaml_finds_the_regularised_minimum():
    algorithm = imaml(cg_steps=5, damping=1.0, strength_damping=0.0)
    one, state = task(), state_of(algorithm)
    phi = algorithm.solved(state.meta, one.support, 300)
    slope = grad(algorithm.support_loss)(phi, one.support)
    for name in phi:
        torch.testing.assert_close(slope[name], -2 * (phi[name] - state.meta[name]), rtol=1e-6, atol=1e-8)


def test_conjugate_gradients_of_nothing():
    zero = {"a": torch.zeros(3)}
    assert conjugate_gradients(lambda v: v, zero, 4)["a"].tolist() == [0, 0, 0]
    b = {"a": torch.tensor([1.0, 2.0])}
    assert conjugate_gradients(lambda v: v, b, 0) is b
    torch.testing.assert_close(conjugate_gradients(lambda v: v, b, 3), b)


def test_lstm_cell_is_that_of_torch():
    torch.manual_seed(0)
    weights = doubled(init_lstm(random.key_of(1), 3, 3))
    assert weights["bias"].tolist() == [0.0] * 3 + [1.0] * 3 + [0.0] * 6
    x, hidden, cell = (torch.randn(2, 3).double() for _ in range(3))
    theirs = torch.nn.LSTMCell(3, 3).double()
    own = {"weight_ih": weights["input"], "weight_hh": weights["recurrent"], "bias_ih": weights["bias"]}
    own["bias_hh"] = torch.zeros(12).double()
    expected = functional_call(theirs, own, (x, (hidden, cell)))
    for found, wanted in zip(lstm_cell(weights, x, hidden, cell), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_matching_is_attention_over_the_examples():
    algorithm = MatchingNetwork(
        **_COMMON | {"backbone": _IDENTITY}, temperature=0.5, full_context=False, processing_steps=1
    )
    one, state = task(), state_of(algorithm)
    expected = torch.zeros(12, 3).double()
    for row, query in enumerate(one.query.x):
        a = torch.stack([F.cosine_similarity(query, x, 0) / 0.5 for x in one.support.x]).softmax(0)
        for weight, y in zip(a, one.support.y, strict=True):
            expected[row, y] += weight
    torch.testing.assert_close(predictions(algorithm, state, one).exp(), expected)


def test_full_context_reads_the_set_both_ways_and_attends():
    algorithm = MatchingNetwork(**_COMMON, temperature=1.0, full_context=True, processing_steps=2)
    one, state = task(), state_of(algorithm)
    assert algorithm.support_order_matters
    z = torch.randn(6, 5).double()
    both = torch.nn.LSTM(5, 5, bidirectional=True).double()
    names = {"forward": "", "backward": "_reverse"}
    own = {}
    for part, suffix in names.items():
        own[f"weight_ih_l0{suffix}"] = state.meta[f"{part}.input"]
        own[f"weight_hh_l0{suffix}"] = state.meta[f"{part}.recurrent"]
        own[f"bias_ih_l0{suffix}"] = state.meta[f"{part}.bias"]
        own[f"bias_hh_l0{suffix}"] = torch.zeros(20).double()
    output = functional_call(both, own, (z[:, None],))[0][:, 0]
    torch.testing.assert_close(algorithm.in_context(state.meta, z), output[:, :5] + output[:, 5:] + z)
    for row, found in zip(z, algorithm.attending(state.meta, z, z), strict=True):
        hidden, memory = row, torch.zeros(5).double()
        for _ in range(2):
            read = (z @ hidden).softmax(0) @ z
            step = lstm_cell(select(state.meta, "attend"), row[None], torch.cat([hidden, read])[None], memory[None])
            hidden, memory = step[0][0] + row, step[1][0]
        torch.testing.assert_close(found, hidden)
    assert all(value.abs().max() > 0 for value in gradients(algorithm, state, one).values())


@pytest.mark.parametrize("maps", [False, True])
def test_relation_network_by_loops(maps):
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
    algorithm = RelationNetwork(**_COMMON | {"backbone": conv4 if maps else _IDENTITY}, filters=5, hidden=[6])
    one = task(features=50 if maps else 4)
    if maps:
        parts = (dataclasses.replace(part, x=part.x.view(-1, 2, 5, 5)) for part in (one.support, one.query))
        one = Task(*parts, _KEY)
    state = doubled(algorithm.init(Spec(one.query.x.shape[1:], 3, 0, "class"), random.key_of(0)))
    meta, total = {name: value + 0.1 for name, value in state.meta.items()}, 0.0
    z = [
        conv4.embed(select(meta, "net"), part.x)[0].view(-1, 3, 5, 5) if maps else part.x[..., None, None]
        for part in (one.support, one.query)
    ]
    for x, y in zip(z[1], one.query.y, strict=True):
        for way in range(3):
            found = torch.cat([z[0][one.support.y == way].sum(0), x])[None]
            for block in range(2):
                weight = meta[f"relation.conv{block}.weight"]
                found = F.conv2d(found, weight, meta[f"relation.conv{block}.bias"], padding="same").relu()
                found = F.max_pool2d(found, 2) if maps else found
            hidden = (meta["relation.linear0.weight"] @ found.flatten() + meta["relation.linear0.bias"]).relu()
            relation = (meta["relation.linear1.weight"] @ hidden + meta["relation.linear1.bias"]).sigmoid()
            total += (relation - float(way == y)) ** 2 / 36
    value = algorithm.loss(State(meta, state.fixed), one, _PROGRESS).value
    torch.testing.assert_close(value, total.squeeze())


def test_siamese_by_loops():
    algorithm = Siamese(**_COMMON | {"backbone": _IDENTITY})
    one, state = task(), state_of(algorithm)
    logits = torch.empty(12, 6).double()
    for row, x in enumerate(one.query.x):
        for column, other in enumerate(one.support.x):
            logits[row, column] = state.meta["pair.alpha"] @ (x - other).abs() + state.meta["pair.bias"]
    same = one.query.y[:, None] == one.support.y
    losses = torch.where(same, -F.logsigmoid(logits), -F.logsigmoid(-logits))
    torch.testing.assert_close(algorithm.loss(state, one, _PROGRESS).value, losses.mean())
    expected = torch.stack([logits[:, one.support.y == way].max(-1).values for way in range(3)], -1)
    torch.testing.assert_close(predictions(algorithm, state, one), expected)


def test_ridge_regression_solves_the_normal_equations():
    torch.manual_seed(0)
    z, y, strength = torch.randn(6, 4).double(), torch.randn(6, 3).double(), torch.tensor(0.7).double()
    normal = torch.linalg.solve(z.T @ z + strength * torch.eye(4).double(), z.T @ y)
    torch.testing.assert_close(ridge(z, y, strength), normal)


def test_r2d2_scales_a_ridge_regression_of_the_labels():
    algorithm = R2D2(**_COMMON | {"backbone": _IDENTITY}, strength=0.5, scale=3.0)
    one, state = task(), state_of(algorithm)
    z, new = (F.pad(part.x, (0, 1), value=1.0) for part in (one.support, one.query))
    y = F.one_hot(one.support.y, 3).double()
    weight = torch.linalg.solve(z.T @ z / len(z) + 0.5 * torch.eye(5).double(), z.T @ y / len(z))  # mean squared error
    torch.testing.assert_close(predictions(algorithm, state, one), 3 * new @ weight)


def test_mapping_gives_weights_and_offsets():
    algorithm = MappingNetwork(**_COMMON | {"backbone": _IDENTITY}, hidden=[6])
    one, state = task(), state_of(algorithm)
    meta = state.meta
    for way in range(3):
        mean = one.support.x[one.support.y == way].mean(0)
        hidden = F.leaky_relu(meta["map0.weight"] @ mean + meta["map0.bias"])
        weight = meta["map1.weight"] @ hidden + meta["map1.bias"]
        expected = (one.query.x @ (weight[:4] + mean) + weight[4]) / 2
        torch.testing.assert_close(predictions(algorithm, state, one)[:, way], expected)


@pytest.mark.parametrize("second_order", [True, False])
def test_metanet_reads_fast_weights_for_each_query(second_order):
    algorithm = MetaNet(
        **_COMMON | {"backbone": _IDENTITY}, hidden=6, representation=5, meta_hidden=7, second_order=second_order
    )
    one, state = task(), state_of(algorithm)
    meta = state.meta | state.fixed
    memory = algorithm.learn(meta, one.support.x, one.support)
    for row, x in enumerate(one.query.x):
        r = meta["represent.layer"] @ x + memory.representation @ x
        a = torch.stack([F.cosine_similarity(r, key, 0) for key in memory.keys]).softmax(0)
        hidden, output = (
            sum(w * f for w, f in zip(a, memory.fast[part], strict=True)) for part in ("hidden", "output")
        )
        h = (meta["base.hidden"] @ x).relu() + (hidden @ x).relu()
        expected = meta["base.output"] @ h + output @ h
        torch.testing.assert_close(predictions(algorithm, state, one)[row], expected)
    # The fast weights of an example come from the gradient of its own loss alone.
    other = dataclasses.replace(one.support, y=torch.cat([one.support.y[:1], one.support.y[1:].flip(0)]))
    changed = algorithm.learn(meta, one.support.x, other)
    torch.testing.assert_close(changed.fast["hidden"][0], memory.fast["hidden"][0])
    found = gradients(algorithm, state, one)
    assert all(value.abs().max() > 0 for value in found.values())
    assert ("represent.output" in found) == second_order  # what no gradient reaches is no meta-parameter


def baseline(**changes):
    settings = dict(
        head="linear", train_scale=3.0, head_scale=4.0, head_steps=7, head_lr=0.3, head_momentum=0.9, head_decay=0.01
    )
    return Baseline(**(_COMMON | {"backbone": _IDENTITY} | settings | changes))


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_baseline_head_descends_as_the_optimiser_of_torch(head):
    algorithm = baseline(head=head)
    one, state = task(), state_of(algorithm, classes=20)
    start = baseline(head=head, head_steps=0).adapt(state, one.support, key=_KEY).head
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimiser = torch.optim.SGD(leaves.values(), lr=0.3, momentum=0.9, dampening=0.9, weight_decay=0.01)

    def logits(x):
        if head == "linear":
            return x @ leaves["weight"].T + leaves["bias"]
        return 4 * F.cosine_similarity(x[:, None], leaves["weight"][None], dim=-1)

    for _ in range(7):
        optimiser.zero_grad()
        F.cross_entropy(logits(one.support.x), one.support.y).backward()
        optimiser.step()
    torch.testing.assert_close(predictions(algorithm, state, one), logits(one.query.x).detach())


def test_logistic_regression_is_at_its_minimum():
    one = task(shot=4)
    z = F.normalize(one.support.x, dim=-1)

    def objective(flat):
        weight = torch.tensor(flat).view(5, 3).requires_grad_()
        value = weight[:-1].square().sum() / 2
        value = value + 1.5 * F.cross_entropy(F.pad(z, (0, 1), value=1.0) @ weight, one.support.y, reduction="sum")
        value.backward()
        return value.item(), weight.grad.flatten().numpy()

    best = scipy.optimize.minimize(objective, torch.zeros(15).double().numpy(), jac=True, tol=1e-12, method="BFGS")
    found = logistic_regression(z, one.support.y, 3, 1.5, 300)
    # The offsets are free up to a constant.
    expected = torch.tensor(best.x).view(5, 3)
    torch.testing.assert_close(found[:-1], expected[:-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[-1] - found[-1].mean(), expected[-1] - expected[-1].mean(), rtol=1e-4, atol=1e-5)


def test_baseline_pp_learns_a_norm_of_each_training_class():
    algorithm = baseline(head="cosine")
    one, state = task(), state_of(algorithm, classes=20)
    z, weight = one.query.x, state.meta["global.weight"]
    cosines = F.cosine_similarity(z[:, None], weight[None], dim=-1)
    torch.testing.assert_close(algorithm.trained_logits(state.meta, z), 3 * cosines * weight.norm(dim=1))


def test_fine_tuning_under_population_statistics_sees_each_example_apart():
    net = {"backbone": _NORMALISED, "statistics": "population"}
    algorithm = FineTuning(**_COMMON | net, inner_lr=0.2, test_inner_steps=3)
    one, state = task(), state_of(algorithm, classes=20)

    def head_after_a_step(x, y):
        support = dataclasses.replace(one.support, x=x, y=y)
        return algorithm.adapt(state, support, key=_KEY, steps=1).params["head.weight"]

    pairs = zip(one.support.x.split(1), one.support.y.split(1), strict=True)
    apart = torch.stack([head_after_a_step(x, y) for x, y in pairs]).mean(0)
    torch.testing.assert_close(head_after_a_step(one.support.x, one.support.y), apart)


def test_fine_tuning_descends_from_the_trained_weights_with_a_new_head():
    algorithm = FineTuning(**_COMMON, inner_lr=0.2, test_inner_steps=3)
    one, state = task(), state_of(algorithm, classes=20)
    params = {name: value.clone().requires_grad_() for name, value in state.meta.items() if name.startswith("net.")}
    params |= {
        "head.weight": torch.zeros(3, 5).double().requires_grad_(),
        "head.bias": torch.zeros(3).double().requires_grad_(),
    }
    optimiser = torch.optim.SGD(params.values(), lr=0.2)
    for _ in range(3):
        optimiser.zero_grad()
        F.cross_entropy(network(params, one.support.x), one.support.y).backward()
        optimiser.step()
    torch.testing.assert_close(predictions(algorithm, state, one), network(params, one.query.x).detach())


def test_class_sums_and_means_agree():
    one = task(shot=5)
    means = class_means(one.support.x, one.support.y, 3)
    torch.testing.assert_close(means[1], one.support.x[one.support.y == 1].mean(0))
