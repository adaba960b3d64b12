"""Check transductive and semi-supervised heads against slow loops over examples, in float64."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
import torch.nn.functional as F

from metalearn.algorithms.bd_cspn import BDCSPN
from metalearn.algorithms.laplacian_shot import LaplacianShot
from metalearn.algorithms.pt_map import PTMAP, power_transform, transport
from metalearn.algorithms.simple_shot import SimpleShot
from metalearn.algorithms.soft_kmeans import SoftKMeans
from metalearn.algorithms.tim import TIM
from metalearn.algorithms.transductive_finetune import TransductiveFineTuning
from metalearn.tasks import prng
from metalearn.tasks.types import Batch
from tests.one_task import COMMON, IDENTITY, PROGRESS, init_state, make_task, predictions

_HEAD: dict[str, Any] = COMMON | {"backbone": IDENTITY}
_BATCHES: dict[str, Any] = _HEAD | {"source": "batches"}


def means_of(support):
    return [support.x[support.y == n].mean(0) for n in range(support.way)]


def unit(x):
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize(
    ("variant", "power"), [("plain", 1), ("distractor_cluster", 1), ("masked", 1), ("masked", 2)]
)
def test_soft_kmeans_weights_each_unlabelled_example(variant, power, iterations):
    algorithm = SoftKMeans(
        **_HEAD, variant=variant, temperature=2.0, iterations=iterations, radius=3.0, hidden=4,
        mask_power=power,
    )  # fmt: skip
    task = make_task(shot=2)
    unlabelled = 2 * torch.randn(7, 4).double()
    support = dataclasses.replace(task.support, unlabelled=unlabelled)
    task = dataclasses.replace(task, support=support)
    state = init_state(algorithm)
    params = {name: value + 0.3 for name, value in state.params.items()}
    means = means_of(support)
    for _ in range(iterations):
        d = np.array([[float(((x - c) ** 2).sum() / 2) for c in means] for x in unlabelled])
        share = np.exp(-d) / np.exp(-d).sum(1, keepdims=True)
        if variant == "distractor_cluster":
            r = np.exp(float(params["head.log_radius"]))
            rest = np.exp(-(unlabelled**2).sum(1).numpy() / 2 / r**2) / r
            share = np.exp(-d) / (np.exp(-d).sum(1) + rest)[:, None]
        if variant == "masked":
            for n in range(3):
                x = d[:, n] / d[:, n].mean()
                inputs = [x.min(), x.max(), x.var(), scipy.stats.skew(x), scipy.stats.kurtosis(x)]
                weight, bias = (
                    [params[f"head.{kind}{layer}"].numpy() for layer in (0, 1)]
                    for kind in ("weight", "bias")
                )
                hidden = np.tanh(weight[0] @ inputs + bias[0])
                threshold, slope = np.exp(weight[1] @ hidden + bias[1])
                share[:, n] *= (1 / (1 + np.exp(slope * (x - threshold)))) ** power
        means = [
            (support.x[support.y == n].sum(0) + torch.tensor(share[:, n]) @ unlabelled)
            / (2 + share[:, n].sum())
            for n in range(3)
        ]
    expected = torch.stack([-((task.query.x - c) ** 2).sum(1) / 2 for c in means], 1)
    torch.testing.assert_close(
        predictions(algorithm, state._replace(params=params), task), expected
    )


def test_soft_kmeans_without_unlabelled_examples_is_protonet():
    algorithm = SoftKMeans(
        **_HEAD, variant="masked", temperature=1.0, iterations=1, radius=1.0, hidden=4
    )
    task = make_task()
    expected = -torch.cdist(task.query.x, torch.stack(means_of(task.support))).square()
    torch.testing.assert_close(predictions(algorithm, init_state(algorithm), task), expected)


def test_masked_soft_kmeans_is_finite_if_all_unlabelled_examples_are_at_a_class_mean():
    algorithm = SoftKMeans(
        **_HEAD, variant="masked", temperature=1.0, iterations=1, radius=1.0, hidden=4
    )
    params = init_state(algorithm).params
    z = torch.zeros(4, 4).double()
    assert algorithm.shares(params, z, z[:3]).isfinite().all()


@pytest.mark.parametrize("most", [None, 2])
def test_bd_cspn_averages_the_members_of_each_class(most):
    algorithm = BDCSPN(**_BATCHES, scale=7.0, most=most)
    task = make_task()
    s, q, y = unit(task.support.x), unit(task.query.x), task.support.y
    q = q + s.mean(0) - q.mean(0)
    basic = [s[y == n].mean(0) for n in range(3)]

    def weights(x):
        return torch.stack([7 * F.cosine_similarity(x, c, 0) for c in basic]).softmax(0)

    rectified = []
    for n in range(3):
        members = [x for x in q if int(weights(x).argmax()) == n]
        members = sorted(members, key=lambda x: -float(weights(x)[n]))[:most]
        members = [*s[y == n], *members]
        rectified.append(sum(weights(x)[n] * x for x in members) / len(members))
    expected = torch.stack([7 * F.cosine_similarity(q, c, -1) for c in rectified], 1)
    torch.testing.assert_close(
        predictions(algorithm, init_state(algorithm, classes=20), task), expected
    )


@pytest.mark.parametrize("rectify", [False, True])
def test_laplacian_shot_follows_its_bound(rectify):
    """Each step lowers the bound of the energy; labels are those of explicit loops."""
    algorithm = LaplacianShot(
        **_BATCHES, features="L2N", smoothness=0.6, neighbours=2, steps=9,
        rectify=rectify,
    )  # fmt: skip
    task, state = make_task(), init_state(algorithm, classes=20)
    s, q, y = unit(task.support.x), unit(task.query.x), task.support.y
    means = torch.stack([s[y == n].mean(0) for n in range(3)])
    if rectify:
        q = q + s.mean(0) - q.mean(0)
        own, others = (
            (10 * F.cosine_similarity(x[:, None], means[None], dim=-1)).softmax(-1) for x in (s, q)
        )
        member = F.one_hot(others.argmax(-1), 3).double()
        total = (F.one_hot(y, 3) * own).T @ s + (member * others).T @ q
        means = total / (2 + member.sum(0))[:, None]
    unary = torch.stack([((q - c) ** 2).sum(1) for c in means], 1)
    nearest = []
    for row in range(12):
        distance = ((q - q[row]) ** 2).sum(1)
        nearest.append([int(i) for i in distance.argsort() if int(i) != row][:2])
    labels = (-unary).softmax(-1)
    for _ in range(9):
        logits = torch.stack(
            [-unary[i] + 0.6 * sum(labels[j] for j in nearest[i]) for i in range(12)]
        )
        labels = logits.softmax(-1)
    torch.testing.assert_close(predictions(algorithm, state, task), logits)


def tim(**changes):
    settings: dict[str, Any] = dict(
        solver="adm", temperature=3.0, supervised_weight=0.1, conditional_weight=0.2, steps=200,
        lr=0.01,
    )  # fmt: skip
    return TIM(**_BATCHES | settings | changes)


def test_tim_alternating_steps_equal_those_of_the_paper():
    algorithm = tim(steps=4)
    task, state = make_task(), init_state(tim(), classes=20)
    s, q, y = unit(task.support.x), unit(task.query.x), F.one_hot(task.support.y, 3).double()
    w = torch.stack([s[task.support.y == n].mean(0) for n in range(3)])

    def p(x, w):
        return torch.stack([-1.5 * ((x - one) ** 2).sum(1) for one in w], 1).softmax(1)

    for _ in range(4):
        power = p(q, w) ** 1.2
        target = power / power.sum(0) ** 0.5
        target = target / target.sum(1, keepdim=True)
        own, ratio = 0.1 / 1.2, 6 / 12
        new = []
        for n in range(3):
            above = sum(y[i, n] * s[i] + p(s, w)[i, n] * (w[n] - s[i]) for i in range(6)) * own
            above = above + ratio * sum(
                target[i, n] * q[i] + p(q, w)[i, n] * (w[n] - q[i]) for i in range(12)
            )
            new.append(above / (own * y[:, n].sum() + ratio * target[:, n].sum()))
        w = torch.stack(new)
    torch.testing.assert_close(predictions(algorithm, state, task).softmax(1), p(q, w))


def test_tim_by_gradient_matches_adam_of_torch_and_lowers_the_loss():
    algorithm = tim(solver="gradient", steps=30)
    task, state = make_task(), init_state(tim(), classes=20)
    s, q, y = unit(task.support.x), unit(task.query.x), task.support.y
    w = torch.stack([s[y == n].mean(0) for n in range(3)]).requires_grad_()
    optimiser, losses = torch.optim.Adam([w], lr=0.01), []
    for _ in range(30):
        log_p = (-1.5 * torch.cdist(q, w).square()).log_softmax(1)
        p = log_p.exp()
        marginal = entropy_of(p.mean(0))
        conditional = torch.stack([entropy_of(one) for one in p]).mean()
        fit = F.cross_entropy(-1.5 * torch.cdist(s, w).square(), y)
        loss = 0.1 * fit - marginal + 0.2 * conditional
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = -1.5 * torch.cdist(q, w).square()
    torch.testing.assert_close(predictions(algorithm, state, task), expected.detach())


def entropy_of(p):
    return -(p * p.log()).sum()


def test_transport_solves_the_linear_program_with_entropy():
    torch.manual_seed(0)
    cost = torch.rand(6, 3).double()
    plan = transport(cost, 5.0, 500)
    torch.testing.assert_close(plan.sum(1), torch.ones(6).double())
    torch.testing.assert_close(plan.sum(0), torch.full((3,), 2.0).double())

    def objective(flat):
        p = np.maximum(flat, 1e-12)
        return p @ cost.flatten().numpy() + (p * np.log(p)).sum() / 5

    def derivative(flat):
        return cost.flatten().numpy() + (np.log(np.maximum(flat, 1e-12)) + 1) / 5

    rows, columns = np.kron(np.eye(6), np.ones(3)), np.kron(np.ones(6), np.eye(3))
    sums, expected = np.concatenate([rows, columns[:2]]), np.array([1.0] * 6 + [2.0] * 2)
    best = scipy.optimize.minimize(
        objective, np.full(18, 1 / 3), jac=derivative, method="SLSQP", bounds=[(1e-9, 1)] * 18,
        options={"ftol": 1e-14, "maxiter": 500},
        constraints={"type": "eq", "fun": lambda p: sums @ p - expected, "jac": lambda p: sums},
    )  # fmt: skip
    np.testing.assert_allclose(plan.flatten().numpy(), best.x, atol=1e-4)
    far = transport(100 * cost.float(), 10.0, 50)  # a kernel that float32 cannot hold
    assert far.isfinite().all() and far.log().isfinite().all()


def test_pt_map_equals_explicit_steps():
    algorithm = PTMAP(**_BATCHES, power=0.5, scale=4.0, step_size=0.3, steps=3, iterations=200)
    task, state = make_task(), init_state(tim(), classes=20)
    task = dataclasses.replace(
        task,
        support=dataclasses.replace(task.support, x=task.support.x.abs()),
        query=dataclasses.replace(task.query, x=task.query.x.abs()),
    )

    def features(x):
        x = unit((x + 1e-6) ** 0.5)
        return unit(x - x.mean(0))

    s, q, y = features(task.support.x), features(task.query.x), task.support.y
    means = [s[y == n].mean(0) for n in range(3)]
    for step in range(4):
        cost = torch.stack([((q - c) ** 2).sum(1) for c in means], 1)
        plan = (-4 * cost).exp()
        for _ in range(200):
            plan = plan / plan.sum(1, keepdim=True)
            plan = plan / plan.sum(0) * 4
        if step < 3:
            for n in range(3):
                new = (s[y == n].sum(0) + plan[:, n] @ q) / (2 + plan[:, n].sum())
                means[n] = means[n] + 0.3 * (new - means[n])
    torch.testing.assert_close(predictions(algorithm, state, task), plan.log())
    negative = power_transform(torch.tensor([-4.0, 0.0, 9.0]), 0.5)
    torch.testing.assert_close(negative, torch.tensor([-2.0, 0.0, 3.0]))


@pytest.mark.parametrize("features", ["embeddings", "logits"])
def test_transductive_fine_tuning_matches_adam_of_torch(features):
    algorithm = TransductiveFineTuning(
        **_BATCHES, features=features, scale=5.0, entropy_weight=0.7, steps=6, lr=0.02
    )
    task, state = make_task(), init_state(tim(), classes=20)
    parts = [task.support.x, task.query.x]
    if features == "logits":
        state.params["global.bias"] += torch.linspace(-0.1, 0.3, 20)
        weight, bias = (state.params[f"global.{name}"] for name in ("weight", "bias"))
        parts = [torch.stack([weight @ x + bias for x in part]) for part in parts]
    (s, q), y = (unit(part.relu()) for part in parts), task.support.y
    w = unit(torch.stack([s[y == n].mean(0) for n in range(3)])).requires_grad_()
    optimiser = torch.optim.Adam([w], lr=0.02)
    for _ in range(6):
        entropy = torch.stack([entropy_of((5 * x @ w.T).softmax(0)) for x in q]).mean()
        optimiser.zero_grad()
        (F.cross_entropy(5 * s @ w.T, y) + 0.7 * entropy).backward()
        optimiser.step()
    torch.testing.assert_close(predictions(algorithm, state, task), (5 * q @ w.T).detach())


def test_simple_shot_centres_by_the_mean_of_training_classes():
    algorithm = SimpleShot(**_BATCHES, features="CL2N", scale=3.0)
    task, state = make_task(), init_state(algorithm, classes=20)
    batches = [5 + torch.randn(8, 4).double() for _ in range(3)]
    for x in batches:
        batch = Batch(x, torch.arange(8), prng.key_of(1))
        loss = algorithm.batch_loss(state, batch, PROGRESS)
        state = state._replace(buffers=state.buffers | loss.buffers)
    decay = torch.tensor([0.99**2, 0.99, 1]).double()
    mean = (decay @ torch.stack([x.mean(0) for x in batches])) / decay.sum()
    s, q = unit(task.support.x - mean), unit(task.query.x - mean)
    means = [s[task.support.y == n].mean(0) for n in range(3)]
    expected = torch.stack([-3 * ((q - c) ** 2).sum(1) for c in means], 1)
    torch.testing.assert_close(predictions(algorithm, state, task), expected)
    plain = dataclasses.replace(algorithm, features="UN", scale=1.0)
    distance = torch.cdist(task.query.x, torch.stack(means_of(task.support))).square()
    torch.testing.assert_close(predictions(plain, state, task), -distance)
