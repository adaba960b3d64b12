"""Check policy gradients against independent computations of the expected return, in float64."""

import dataclasses
import io
import itertools
import json
import math
import re
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.func import grad, hessian

import metalearn
from metalearn.algorithms.maml import MAML
from metalearn.cli.compare import compare
from metalearn.config import checking, composition
from metalearn.data.navigation import Plane
from metalearn.engine import Engine
from metalearn.run.build import build
from metalearn.run.evaluate import evaluate
from metalearn.run.train import train
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.control import PolicyGradient, Rollouts, surrogate
from metalearn.tasks.types import Loss, Query, Spec, Support, Task
from tests.fixtures import to_float64
from tests.one_task import GRADIENT, IDENTITY, KEY, gradients

_STATES, _ACTIONS, _HORIZON = 3, 2, 4


class Chain:
    """A random decision process; its expected return by dynamic programming in plain Python."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        raw = torch.rand(_STATES, _ACTIONS, _STATES, generator=generator, dtype=torch.float64)
        self.next = raw / raw.sum(-1, keepdim=True)
        self.rewards = torch.randn(_STATES, _ACTIONS, generator=generator, dtype=torch.float64)

    def values(self, logits):
        """Return the value of each state with _HORIZON, _HORIZON - 1, … 0 steps left."""
        policy, values = logits.softmax(-1).tolist(), [[0.0] * _STATES]
        next_, rewards = self.next.tolist(), self.rewards.tolist()
        for _ in range(_HORIZON):
            values.append(
                [
                    sum(
                        policy[s][a]
                        * (
                            rewards[s][a]
                            + sum(next_[s][a][t] * values[-1][t] for t in range(_STATES))
                        )
                        for a in range(_ACTIONS)
                    )
                    for s in range(_STATES)
                ]
            )
        return values[::-1]

    def expected_return(self, logits):
        return self.values(logits)[0][0]


@dataclasses.dataclass(frozen=True)
class Enumerated:
    """Every trajectory from state 0, weighted by its probability: expectations without noise."""

    chains: tuple[Chain, Chain]
    dice_lambda: float

    metric: Any = None
    target: str = "control"
    predicts: bool = False

    def init(self, spec, key):
        return {}

    def loss(self, net, params, chain):
        """Return the surrogate of one chain; its derivatives are of minus the expected return."""
        logits = net(params, torch.eye(_STATES, dtype=torch.float64))[0]
        steps = list(itertools.product(range(_STATES), range(_ACTIONS)))
        states, actions = torch.tensor(
            [path for path in itertools.product(steps, repeat=_HORIZON) if path[0][0] == 0]
        ).permute(2, 1, 0)
        log_p = logits.log_softmax(-1)[states, actions]
        weight = log_p.detach().sum(0).exp()
        for step in range(_HORIZON - 1):
            weight = weight * chain.next[states[step], actions[step], states[step + 1]]
        to_go = chain.rewards[states, actions].flip(0).cumsum(0).flip(0)
        with torch.no_grad():  # a baseline: the mean of what follows a state, over its trajectories
            base = torch.zeros_like(to_go)
            for step, state in itertools.product(range(_HORIZON), range(_STATES)):
                here = states[step] == state
                total = weight[here].sum().clamp_min(1e-300)
                base[step, here] = (weight * to_go[step])[here].sum() / total
        advantages = weight * (to_go - base)
        return surrogate(log_p, advantages, self.dice_lambda) * log_p.numel()

    def support_loss(self, net, params, support, key):
        return self.loss(net, params, self.chains[0])

    def query_loss(self, net, params, query, key):
        value = self.loss(net, params, self.chains[1])
        return Loss(value, {"loss": value.detach()}, {})


def finite_differences(function, point, size):
    """Return the gradient of a function of a tensor by central differences."""
    result = torch.zeros_like(point)
    for index in itertools.product(*map(range, point.shape)):
        step = torch.zeros_like(point)
        step[index] = size
        result[index] = (function(point + step) - function(point - step)) / (2 * size)
    return result


def enumerated_maml(dice_lambda, first_order=False):
    """Return one-step MAML on enumerated trajectories, a state and a task."""
    family: Any = Enumerated((Chain(0), Chain(1)), dice_lambda)
    settings = GRADIENT | {"inner_steps": 1, "first_order": first_order}
    algorithm = MAML(backbone=IDENTITY, statistics="query", family=family, **settings)
    state = algorithm.init(Spec((_STATES,), _ACTIONS, 0, "control"), prng.key_of(3))
    x = torch.zeros(1, _STATES).double()
    return algorithm, to_float64(state), Task(Support(x, x, 1), Query(x, x), KEY)


@pytest.mark.parametrize("first_order", [False, True])
def test_meta_gradient_is_that_of_the_expected_return_after_an_inner_step(first_order):
    algorithm, state, task = enumerated_maml(1.0, first_order)
    first, second = algorithm.family.chains
    bias = state.params["head.bias"]

    def step(logits):
        """Return the logits after a step along the gradient of the first chain's return.

        The step is in the head's weight [A, S] and its bias [A], which all states share.
        """
        gradient = finite_differences(first.expected_return, logits, 1e-4)
        return logits + algorithm.inner_lr * (gradient + gradient.sum(0))

    logits = state.params["head.weight"].T + bias
    meta = (
        finite_differences(second.expected_return, step(logits), 1e-4)
        if first_order
        else finite_differences(lambda now: second.expected_return(step(now)), logits, 1e-4)
    )
    own = gradients(algorithm, state, task)
    torch.testing.assert_close(-own["head.weight"].T, meta, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(-own["head.bias"], meta.sum(0), rtol=1e-5, atol=1e-7)


def test_smaller_dice_lambda_has_the_same_gradient_and_a_biased_second_derivative():
    def derivatives(dice_lambda, of):
        algorithm, state, _ = enumerated_maml(dice_lambda)
        family: Any = algorithm.family

        def loss(weight):
            return family.loss(lambda weight, x: (x @ weight, {}), weight, family.chains[0])

        return of(loss)(state.params["head.weight"].T.contiguous())

    for dice_lambda in (0.0, 0.5):
        torch.testing.assert_close(derivatives(dice_lambda, grad), derivatives(1.0, grad))
    exact, half, none = (derivatives(one, hessian) for one in (1.0, 0.5, 0.0))
    assert 0.01 < (half - exact).norm() / exact.norm() < (none - exact).norm() / exact.norm()


class Line:
    """s' = s + a with reward -(s' - y)^2: with a linear policy, s is normal at every step."""

    horizon = 3

    def step(self, state, action, y):
        state = state + action
        never = torch.zeros_like(state[:, 0], dtype=torch.bool)
        return state, -(state - y).square().sum(-1), never

    def expected_return(self, weight, bias, log_std, goal):
        mean = variance = total = torch.zeros((), dtype=torch.float64)
        for _ in range(self.horizon):
            mean = mean + weight * mean + bias
            variance = (1 + weight) ** 2 * variance + (2 * log_std).exp()
            total = total - (mean - goal) ** 2 - variance
        return total


def test_derivatives_of_sampled_trajectories_are_right_in_expectation():
    line: Any = Line()
    goal, theta = 0.7, torch.tensor([-0.4, 0.3, -0.8], dtype=torch.float64)
    x = torch.zeros(40_000, 1, dtype=torch.float64)
    support = Support(x, torch.full_like(x, goal), 1)

    def exact(theta):
        return -line.expected_return(*theta, goal)

    def sampled(dice_lambda, of):
        """Return the mean of a derivative over four sets of trajectories."""
        family = PolicyGradient(line, 1.0, dice_lambda, False, 0.0)

        def loss(theta, key):
            params = {"weight": theta[0], "bias": theta[1], "head.log_std": theta[2:]}

            def net(params, x):
                return params["weight"] * x + params["bias"], {}

            return family.support_loss(net, params, support, key) * line.horizon

        return torch.stack([of(loss)(theta, prng.key_of(seed)) for seed in range(4)]).mean(0)

    # Four standard errors.
    torch.testing.assert_close(sampled(1.0, grad), grad(exact)(theta), rtol=0, atol=0.05)
    torch.testing.assert_close(sampled(1.0, hessian), hessian(exact)(theta), rtol=0, atol=0.3)
    assert (sampled(0.0, hessian) - hessian(exact)(theta)).abs().max() > 0.6


@pytest.mark.parametrize("standardise", [False, True])
def test_advantages_are_discounted_rewards_to_go_minus_a_linear_baseline(standardise):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(5, 3, 2, generator=generator, dtype=torch.float64)
    alive = torch.ones(5, 3).double()
    alive[3:, 1] = 0
    rewards = alive * torch.randn(5, 3, generator=generator, dtype=torch.float64)
    rows, targets, steps = [], [], []
    for walk, step in itertools.product(range(3), range(5)):
        if alive[step, walk]:
            rest = [0.9 ** (t - step) * rewards[t, walk].item() for t in range(step, 5)]
            s, time = states[step, walk].tolist(), step / 5
            rows.append([*s, *(one**2 for one in s), time, time**2, time**3, 1])
            targets.append(sum(rest))
            steps.append((step, walk))
    left, right = (torch.tensor(one, dtype=torch.float64) for one in (rows, targets))
    ridge = 1e-3 * torch.eye(left.shape[1]).double()
    expected = right - left @ torch.linalg.solve(left.T @ left + ridge, left.T @ right)
    if standardise:
        expected = (expected - expected.mean()) / (expected.var(correction=0) + 1e-8).sqrt()
    line: Any = Line()
    family = PolicyGradient(line, 0.9, 1.0, standardise, 0.0)
    found = family.advantages(Rollouts(states, states, rewards, alive))
    torch.testing.assert_close(torch.stack([found[one] for one in steps]), expected)
    assert not found[alive == 0].any()


def test_queries_have_trajectories_of_their_own():
    line: Any = Line()
    family = PolicyGradient(line, 1.0, 1.0, True, 0.0)
    x = torch.zeros(6, 1, dtype=torch.float64)

    def net(params, x):
        return params["bias"] + 0 * x, {}

    def loss(log_std, is_query):
        params = {"bias": torch.zeros(1).double(), "head.log_std": log_std}
        if is_query:
            return family.query_loss(net, params, Query(x, x), KEY).value
        return family.support_loss(net, params, Support(x, x, 1), KEY)

    own, other = (grad(loss)(torch.zeros(1).double(), one) for one in (False, True))
    assert not torch.allclose(own, other)


def test_plane_follows_its_rules_and_the_oracle_is_the_best_walk():
    goal = [0.25, -0.18]
    plane = Plane(6)
    family = PolicyGradient(plane, 0.99, 1.0, True, -1.0)
    x = torch.zeros(5, 2, dtype=torch.float64)
    query = Query(x, torch.tensor(goal, dtype=torch.float64).expand(5, 2))
    params = {"head.log_std": torch.full((2,), -1.0, dtype=torch.float64)}

    def net(params, x):
        return 10 * (query.y[: len(x)] - x), {}  # straight to the goal, with noise

    rollouts = family.rollouts(net, params, query, KEY)
    for walk in range(5):
        position, is_alive = [0.0, 0.0], True
        for step in range(6):
            assert rollouts.states[step, walk].tolist() == pytest.approx(position)
            assert rollouts.alive[step, walk] == is_alive
            action = rollouts.actions[step, walk].tolist()
            position = [
                at + max(-0.1, min(0.1, 0.1 * move))
                for at, move in zip(position, action, strict=True)
            ]
            reward = -math.dist(position, goal) if is_alive else 0
            assert rollouts.rewards[step, walk].item() == pytest.approx(reward)
            near = [abs(at - target) < 0.01 for at, target in zip(position, goal, strict=True)]
            is_alive = is_alive and not all(near)
    params["head.log_std"] = torch.full((2,), -20.0, dtype=torch.float64)
    best = plane.best_return(torch.tensor(goal, dtype=torch.float64))
    without_noise = family.score(net, params, query, KEY)
    torch.testing.assert_close(without_noise, best, rtol=1e-5, atol=1e-6)
    assert best > rollouts.rewards.sum(0).max()
    assert best == pytest.approx(-math.hypot(0.15, 0.08) - 0.05)


_SMALL = [
    "dataset=navigation", "dataset.horizon=8", "episode.shot=6", "episode.train.shot=6",
    "episode.query=5", "episode.train.query=5", "backbone.hidden=[8]", "train.meta_batch=2",
    "train.steps=2", "val.every=2", "val.episodes=3", "test.episodes=4", "logger=none",
    "device=cpu",
]  # fmt: skip


@pytest.mark.parametrize("name", ["maml", "fomaml", "reptile", "cavia"])
def test_methods_adapt_a_policy_in_every_strategy(name):
    run = build(checking.check_config(composition.compose_config([f"algo={name}", *_SMALL])))
    tasks, state = to_float64(run.train.draw(0, 3)), to_float64(run.state)
    progress = torch.zeros((), dtype=torch.float64)
    has_own = run.train_engine.has_own_loss(tasks)
    steps = [
        Engine(run.algorithm, one, 3).step(state, tasks, progress)
        for one in (["vmap", "loop"] if has_own else ["vmap", "loop", "mixed"])
    ]
    for step in steps[1:]:
        torch.testing.assert_close(step.gradients, steps[0].gradients, rtol=1e-7, atol=1e-9)
    assert all(value.abs().max() > 0 for value in steps[0].gradients.values())
    before, after = (
        [Engine(run.algorithm, one, 3).scores(state, tasks, steps) for one in ("vmap", "loop")]
        for steps in (0, 2)
    )
    torch.testing.assert_close(*before)
    torch.testing.assert_close(*after)
    assert not torch.equal(before[0], after[0])
    assert run.train_engine.strategy == run.test_engine.strategy == "vmap"


def test_policy_does_not_see_the_goal():
    run = build(checking.check_config(composition.compose_config(["algo=maml", *_SMALL])))
    assert run.state.params["head.log_std"].tolist() == pytest.approx([-0.7, -0.7])
    task = run.test.draw(0, 1)
    assert not task.support.x.any() and not task.query.x.any()
    family, algorithm = run.family, run.algorithm
    assert isinstance(family, PolicyGradient)
    learner = algorithm.adapt(run.state, Support(task.support.x[0], task.support.y[0], 1), key=KEY,
                              steps=0)  # fmt: skip

    def net(params, x):
        return algorithm.forward(run.state, learner, x, None)

    walks = [
        family.rollouts(net, run.state.params, Query(task.query.x[0], goal), KEY).actions
        for goal in (task.query.y[0], task.query.y[0] + 0.2)
    ]
    assert torch.equal(*walks)


def test_a_run_reports_returns(tmp_path):
    folder, overrides = tmp_path / "run", ["algo=maml", *_SMALL]
    console = Console(record=True, width=200, file=io.StringIO())
    train(composition.compose_config(overrides), folder, "maml", overrides, console)
    evaluate(folder, [], "test", "steps", console, points="0,1")
    compare([folder], None, console)
    text = console.export_text()
    assert re.search(r"step +2/2 .* return -[\d.]+ .*val -[\d.]+ ± [\d.]+", text)
    assert text.count("test return") == 2 and "return, higher is better; ±" in text
    assert "accuracy" not in text and "%" not in text.replace("95% interval", "")
    result = json.loads((folder / "result.json").read_text())
    assert result["test"]["return"]["mean"] < 0 and result["protocol"]["statistics"] == "none"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train.return"] < 0 and rows[-1]["val.return"] < 0
    with pytest.raises(UserError, match="no labelled examples"):
        metalearn.load(folder)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["algo=protonet"], "ProtoNet learns classes, but this dataset has control"),
        (["algo=maml", "episode.way=5"], "way=5 does not apply to control"),
        (["algo=maml", "dataset.goal=[1,0]"], r"dataset.goal=\[1.0, 0.0\] should be \[low, high\]"),
        (["algo=maml", "loss.name=focal"], "loss.name=focal: there is no such name"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(overrides, line):
    config = composition.compose_config(["dataset=navigation", *overrides])
    with pytest.raises(UserError, match=line):
        build(checking.check_config(config))
