"""Check metric, closed-form and generative heads against slow computations, in float64."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from metalearn.algorithms.calibration import Calibration
from metalearn.algorithms.feat import FEAT
from metalearn.algorithms.frn import FRN
from metalearn.algorithms.hallucinate import Hallucination
from metalearn.algorithms.meta_baseline import MetaBaseline
from metalearn.algorithms.metaopt_svm import MetaOptSVM, svm_dual
from metalearn.backbones.conv4 import Conv4
from metalearn.tasks import prng
from metalearn.tasks.types import Batch, Spec, Task
from tests.fixtures import to_float64
from tests.one_task import (
    COMMON,
    IDENTITY,
    KEY,
    PROGRESS,
    gradients,
    init_state,
    make_task,
    predictions,
)

_HEAD: dict[str, Any] = COMMON | {"backbone": IDENTITY}


def changed(state, by=0.1):
    """Return a state whose parameters are all different from their initial values."""
    torch.manual_seed(1)
    params = {name: x + by * torch.randn_like(x) for name, x in state.params.items()}
    return state._replace(params=params)


def test_meta_baseline_scales_the_cosines_to_the_class_means():
    algorithm = MetaBaseline(**_HEAD, scale=7.0)
    task, state = make_task(), init_state(algorithm)
    means = [task.support.x[task.support.y == n].mean(0) for n in range(3)]
    expected = [7 * F.cosine_similarity(task.query.x, c, -1) for c in means]
    torch.testing.assert_close(predictions(algorithm, state, task), torch.stack(expected, 1))
    assert gradients(algorithm, state, task)["head.log_scale"] != 0


def attention(params, z):
    """Apply the set function of FEAT to a set, with torch's attention."""
    layer = torch.nn.MultiheadAttention(4, 1, bias=True).double()
    names = ("query", "key", "value")
    weight = torch.cat([params[f"head.{name}"] for name in names])
    with torch.no_grad():
        layer.in_proj_weight.copy_(weight)
        layer.in_proj_bias.zero_()
        layer.out_proj.weight.copy_(params["head.output"])
        layer.out_proj.bias.copy_(params["head.bias"])
        read = layer(z[:, None], z[:, None], z[:, None])[0][:, 0]
    norm = params["head.norm.weight"], params["head.norm.bias"]
    return F.layer_norm(z + read, (4,), *norm)


def test_feat_adapts_class_means_and_contrasts_classes():
    algorithm = FEAT(**_HEAD, temperature=2.0, contrast=0.3, contrast_temperature=5.0)
    task, state = make_task(), changed(init_state(algorithm))
    x, y = task.support.x, task.support.y
    means = torch.stack([x[y == n].mean(0) for n in range(3)])
    expected = -torch.cdist(task.query.x, attention(state.params, means)).square() / 2
    torch.testing.assert_close(predictions(algorithm, state, task), expected)
    loss = F.cross_entropy(expected, task.query.y)
    every, labels = torch.cat([x, task.query.x]), torch.cat([y, task.query.y])
    centres = [attention(state.params, every[labels == n]).mean(0) for n in range(3)]
    contrast = F.cross_entropy(-torch.cdist(every, torch.stack(centres)).square() / 5, labels)
    value = algorithm.loss(state, task, PROGRESS).value
    torch.testing.assert_close(value, loss + 0.3 * contrast)
    assert all(x.abs().max() > 0 for x in gradients(algorithm, state, task).values())


def test_feat_has_dropout_in_its_loss_alone():
    plain = FEAT(**_HEAD, temperature=2.0, contrast=0.3, contrast_temperature=5.0)
    algorithm = dataclasses.replace(plain, attention_dropout=0.3, dropout=0.5)
    task, state = make_task(), changed(init_state(algorithm))
    weights = {n.removeprefix("head."): x for n, x in state.params.items()}
    x, y = task.support.x, task.support.y
    expected = predictions(plain, state, task)
    torch.testing.assert_close(predictions(algorithm, state, task), expected)

    def adapted(z, labels, key):
        keep = prng.uniform(prng.fold_in(key, 0), (len(z), len(z))) >= 0.3
        keep_output = prng.uniform(prng.fold_in(key, 1), tuple(z.shape)) >= 0.5
        rows = []
        for i, one in enumerate(z):
            seen = [j for j in range(len(z)) if labels[j] == labels[i]]
            scores = [(weights["query"] @ one) @ (weights["key"] @ z[j]) / 2 for j in seen]
            read = torch.zeros(4).double()
            for share, j in zip(torch.stack(scores).softmax(0), seen, strict=True):
                read += share * float(keep[i, j]) / 0.7 * (weights["value"] @ z[j])
            change = (weights["output"] @ read + weights["bias"]) * keep_output[i] / 0.5
            rows.append(
                F.layer_norm(one + change, (4,), weights["norm.weight"], weights["norm.bias"])
            )
        return torch.stack(rows)

    keys = [prng.fold_in(prng.fold_in(KEY, 100), number) for number in range(2)]
    means = torch.stack([x[y == n].mean(0) for n in range(3)])
    means = adapted(means, [0, 0, 0], keys[0])
    loss = F.cross_entropy(-torch.cdist(task.query.x, means).square() / 2, task.query.y)
    every, labels = torch.cat([x, task.query.x]), torch.cat([y, task.query.y])
    moved = adapted(every, labels, keys[1])
    centres = torch.stack([moved[labels == n].mean(0) for n in range(3)])
    contrast = F.cross_entropy(-torch.cdist(every, centres).square() / 5, labels)
    value = algorithm.loss(state, task, PROGRESS).value
    torch.testing.assert_close(value, loss + 0.3 * contrast)
    other = algorithm.loss(state, Task(task.support, task.query, KEY + 1), PROGRESS).value
    assert not torch.allclose(other, value)


def maps_of(algorithm, net, x, divisor):
    """Compute feature maps [M, C, 4] of images."""
    return algorithm.backbone.embed(net, x)[0].unflatten(-1, (-1, 4)) / divisor


def reconstruction_errors(pools, maps, penalty, rho):
    """Compute the mean error [Q, N] over the positions of maps [Q, C, r], by least squares.

    min_w |feature - w pool|^2 + penalty |w|^2 for each feature, with a pool [P, C] of each class.
    """
    errors = torch.empty(len(maps), len(pools)).double()
    for n, pool in enumerate(pools):
        left = torch.cat([pool.T, penalty**0.5 * torch.eye(len(pool)).double()])
        for row, x in enumerate(maps):
            own = []
            for feature in x.T:
                right = torch.cat([feature, torch.zeros(len(pool)).double()])
                w = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
                own.append((feature - rho * w @ pool).square().sum())
            errors[row, n] = torch.stack(own).mean()
    return errors


def conv4_of(channels):
    return Conv4(
        filters=channels, blocks=1, halvings=0, downsample="pool", output="flatten",
        normalisation="none", activation="tanh", eps=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("channels", "most", "norm"), [(3, None, "all"), (3, 2, "position"), (30, 64, "all")]
)  # 30: more channels than the 24 positions of the support set
def test_frn_reconstructs_feature_maps_by_ridge_regression(channels, most, norm):
    algorithm = FRN(
        **COMMON | {"backbone": conv4_of(channels)}, scale=2.0, auxiliary=0.5, most_channels=most,
        auxiliary_norm=norm,
    )  # fmt: skip
    task = make_task(features=8)
    parts: Any = [
        dataclasses.replace(part, x=part.x.view(-1, 2, 2, 2)) for part in (task.support, task.query)
    ]
    task = Task(parts[0], parts[1], KEY)
    state = changed(to_float64(algorithm.init(Spec((2, 2, 2), 3, 0, "class"), prng.key_of(0))))
    net = {n.removeprefix("net."): x for n, x in state.params.items() if n.startswith("net.")}
    divisor = channels**0.5 if most == 2 else 1
    s, q = (maps_of(algorithm, net, part.x, divisor) for part in parts)
    penalty = 2 * 4 / channels * float(state.params["head.alpha"].exp()) + 1e-6
    rho, scale = (float(state.params[f"head.{name}"].exp()) for name in ("beta", "log_scale"))
    pools = [torch.cat([x.T for x in s[task.support.y == n]]) for n in range(3)]
    expected = -scale * reconstruction_errors(pools, q, penalty, rho)
    torch.testing.assert_close(predictions(algorithm, state, task), expected)
    size = torch.cat(pools).norm()
    pools = [
        torch.stack([row / (size if norm == "all" else row.norm()) for row in pool])
        for pool in pools
    ]
    overlap = sum((pools[m] @ pools[n].T).square().sum() for n in range(3) for m in range(n))
    value = algorithm.loss(state, task, PROGRESS).value
    torch.testing.assert_close(value, F.cross_entropy(expected, task.query.y) + 0.5 * overlap)


@pytest.mark.parametrize(("channels", "most"), [(3, 2), (30, 64)])
def test_frn_on_batches_reconstructs_from_learned_maps_of_training_classes(channels, most):
    algorithm = FRN(
        **COMMON | {"backbone": conv4_of(channels), "source": "batches"}, scale=2.0, auxiliary=0.5,
        most_channels=most,
    )  # fmt: skip
    torch.manual_seed(0)
    batch = Batch(torch.randn(6, 2, 2, 2).double(), torch.tensor([4, 0, 1, 2, 3, 4]), KEY)
    state = changed(to_float64(algorithm.init(Spec((2, 2, 2), 3, 5, "class"), prng.key_of(0))))
    net = {n.removeprefix("net."): x for n, x in state.params.items() if n.startswith("net.")}
    maps = maps_of(algorithm, net, batch.x, channels**0.5 if most == 2 else 1)
    pools = [own.T for own in state.params["global.map"]]
    errors = reconstruction_errors(pools, maps, 4 / channels + 1e-6, 1.0)
    expected = F.cross_entropy(-float(state.params["head.log_scale"].exp()) * errors, batch.y)
    torch.testing.assert_close(algorithm.batch_loss(state, batch, PROGRESS).value, expected)


@pytest.mark.parametrize("cost", [0.1, 10.0])
def test_svm_equals_scikit_learn(cost):
    task = make_task(shot=5)
    z, y = task.support.x, F.one_hot(task.support.y, 3).double()
    a = svm_dual(z @ z.T, y, cost, 25)
    machine = LinearSVC(
        C=cost, multi_class="crammer_singer", fit_intercept=False, tol=1e-9, max_iter=1_000_000
    ).fit(z.numpy(), task.support.y.numpy())
    np.testing.assert_allclose((a.T @ z).numpy(), machine.coef_, atol=2e-5)
    torch.testing.assert_close(a.sum(1), torch.zeros(15).double(), rtol=0, atol=1e-8)
    assert (a - cost * y).max() < 1e-8


def test_svm_is_differentiated_at_its_solution():
    """The gradient equals finite differences of the solution, and of logits through the method."""
    task = make_task(shot=3)
    z, y = task.support.x, F.one_hot(task.support.y, 3).double()

    def objective(z):
        return (svm_dual(z @ z.T, y, 0.4, 25) * torch.arange(27).view(9, 3)).sum()

    leaf = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(leaf), leaf)
    torch.manual_seed(0)
    for _ in range(4):
        direction = 1e-5 * torch.randn_like(z)
        difference = objective(z + direction) - objective(z - direction)
        torch.testing.assert_close(
            (2 * gradient * direction).sum(), difference, rtol=1e-4, atol=1e-10
        )
    algorithm = MetaOptSVM(**_HEAD, cost=0.4, iterations=25, scale=3.0)
    a = svm_dual(z @ z.T, y, 0.4, 25)
    expected = 3 * task.query.x @ z.T @ a
    state = init_state(algorithm)
    torch.testing.assert_close(predictions(algorithm, state, task), expected)


def test_svm_with_a_diagonal_is_that_of_examples_with_a_feature_of_their_own():
    task = make_task(shot=5)
    x, y = task.support.x.numpy(), task.support.y.numpy()
    algorithm = MetaOptSVM(**_HEAD, cost=0.4, iterations=25, scale=3.0, diagonal=1.0)
    machine = LinearSVC(
        C=0.4, multi_class="crammer_singer", fit_intercept=False, tol=1e-9, max_iter=1_000_000
    ).fit(np.concatenate([x, np.eye(15)], 1), y)
    expected = 3 * task.query.x.numpy() @ machine.coef_[:, :4].T
    found = predictions(algorithm, init_state(algorithm), task).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    plain = dataclasses.replace(algorithm, diagonal=0.0)
    assert abs(predictions(plain, init_state(plain), task).numpy() - expected).max() > 0.1


def test_hallucination_adds_generated_examples():
    algorithm = Hallucination(**_HEAD, generated=3, temperature=2.0)
    task, state = make_task(), init_state(algorithm)
    seeds = task.support.x.abs()
    plain = algorithm.generate(state.params, seeds, torch.randn_like(seeds))
    torch.testing.assert_close(plain, seeds)  # the identity at the start
    state = changed(state)
    noise = prng.normal(KEY, (3, 4)).double()
    means = []
    for n in range(3):
        members = list(task.support.x[task.support.y == n])
        for x in members[:]:
            for e in noise:
                h = torch.cat([x, e])
                for layer in range(3):
                    weight, bias = (state.params[f"head.{k}{layer}"] for k in ("weight", "bias"))
                    h = (weight @ h + bias).relu()
                members.append(h)
        means.append(torch.stack(members).mean(0))
    expected = -torch.cdist(task.query.x, torch.stack(means)).square() / 2
    torch.testing.assert_close(predictions(algorithm, state, task), expected)
    assert all(x.abs().max() > 0 for x in gradients(algorithm, state, task).values())


def test_calibration_counts_earlier_batches_less():
    settings: dict[str, Any] = dict(
        power=0.5, neighbours=2, spread=0.2, samples=3, cost=1.0, iterations=3, decay=0.5
    )
    algorithm = Calibration(**_HEAD | {"source": "batches"}, **settings)
    state = init_state(algorithm, classes=2)
    x, y = make_task(shot=2).support.x[:4], torch.tensor([0, 1, 0, 0])
    for part in (slice(0, 2), slice(2, 4)):
        loss = algorithm.batch_loss(state, Batch(x[part], y[part], KEY), PROGRESS)
        state = state._replace(buffers=state.buffers | loss.buffers)
    expected = torch.stack([x[0] / 2 + x[2] + x[3], x[1] / 2])
    torch.testing.assert_close(state.buffers["head.sum"], expected)
    assert state.buffers["head.count"].tolist() == [2.5, 0.5]


def test_calibration_samples_with_the_statistics_of_the_nearest_training_classes():
    algorithm = Calibration(
        **_HEAD | {"source": "batches"}, power=0.5, neighbours=2, spread=0.21, samples=30,
        cost=1.0, iterations=4000, decay=1.0,
    )  # fmt: skip
    task, state = make_task(shot=2), init_state(algorithm, classes=5)
    torch.manual_seed(0)
    x, y = torch.randn(200, 4).double().abs() + 1, torch.arange(200) % 5
    x = x + 2 * F.one_hot(y, 5).double()[:, :4]
    for rows in torch.arange(200).split(40):
        batch = Batch(x[rows], y[rows], prng.key_of(1))
        loss = algorithm.batch_loss(state, batch, PROGRESS)
        state = state._replace(buffers=state.buffers | loss.buffers)
    support = dataclasses.replace(task.support, x=task.support.x.abs())
    query = task.query.x.abs()
    means = [x[y == c].mean(0).numpy() for c in range(5)]
    covariances = [np.cov(x[y == c].numpy().T, ddof=0) for c in range(5)]
    u = support.x.sqrt().numpy()
    mean, factor = algorithm.gaussians(state.buffers, torch.tensor(u))
    noise = prng.normal(KEY, (15, 4)).double().numpy()
    samples, labels = list(u), list(support.y)
    for row, example in enumerate(u):
        order = np.argsort([np.linalg.norm(example - m) for m in means])[:2]
        own = np.mean([means[order[0]], means[order[1]], example], 0)
        covariance = np.mean([covariances[c] for c in order], 0) + 0.21
        np.testing.assert_allclose(mean[row].numpy(), own)
        product = (factor[row] @ factor[row].T).numpy()
        np.testing.assert_allclose(product, covariance, atol=2e-3 * covariance.max())
        samples += list(own + noise @ factor[row].numpy().T)
        labels += [support.y[row]] * 15
    fitted = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(samples, np.array(labels))
    learner = algorithm.adapt(state, support, key=KEY)
    found = algorithm.predict(state, learner, query).softmax(-1)
    np.testing.assert_allclose(found.numpy(), fitted.predict_proba(query.sqrt().numpy()), atol=1e-3)
