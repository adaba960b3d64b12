"""Losses against closed forms, for labels and for probabilities."""

import pytest
import torch
import torch.nn.functional as F

from metalearn.config import checking, composition
from metalearn.run.pairings import check
from metalearn.system.errors import UserError
from metalearn.tasks.losses import LOSSES, class_weighted, cross_entropy, focal
from tests.toys import cubic

_LOGITS = 3 * torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
_Y = torch.tensor([0] * 6 + [1] * 3 + [2] * 3)


@pytest.mark.parametrize("name", sorted(LOSSES["class"].keys() - {"cubic"}))
def test_probabilities_of_one_class_are_labels(name):
    loss = LOSSES["class"][name]
    torch.testing.assert_close(loss(_LOGITS, F.one_hot(_Y, 4).float()), loss(_LOGITS, _Y))
    mapped = torch.func.vmap(loss)(_LOGITS.view(2, 6, 4), _Y.view(2, 6))
    torch.testing.assert_close(
        mapped, torch.stack([loss(_LOGITS[:6], _Y[:6]), loss(_LOGITS[6:], _Y[6:])])
    )
    x = _LOGITS.double().requires_grad_()  # inner loops need second derivatives
    assert torch.autograd.gradgradcheck(lambda x: loss(x, _Y), x)
    sure = (1e4 * F.one_hot(_Y, 4).float()).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(sure, _Y), sure)
    assert gradient.isfinite().all()


def test_focal_loss_weights_hard_examples():
    p = _LOGITS.softmax(-1)[torch.arange(12), _Y]
    torch.testing.assert_close(focal(_LOGITS, _Y, 3.0), -((1 - p) ** 3 * p.log()).mean())
    torch.testing.assert_close(focal(_LOGITS, _Y, 0.0), cross_entropy(_LOGITS, _Y))


def test_class_weights_give_each_class_the_same_total_weight():
    each = F.cross_entropy(_LOGITS, _Y, reduction="none")
    means = torch.stack([each[label == _Y].mean() for label in range(3)])
    torch.testing.assert_close(class_weighted(_LOGITS, _Y), means.mean())
    torch.testing.assert_close(class_weighted(_LOGITS, _Y, 0.0), each.mean())
    weight = torch.tensor([6, 3, 3, 1]) ** -0.5
    torch.testing.assert_close(
        class_weighted(_LOGITS, _Y, 0.5), F.cross_entropy(_LOGITS, _Y, weight)
    )


def test_inner_loops_have_their_own_loss_and_settings(make_run):
    words = ["algo=maml", "train.meta_batch=2"]
    plain, smooth, smoother = (
        make_run(*words, *more)
        for more in (
            [],
            ["loss.inner=label_smoothing"],
            ["loss.inner=label_smoothing", "+loss.inner_settings.smoothing=0.5"],
        )
    )
    tasks = plain.train.draw(0, 2)
    losses = {
        float(run.train_engine.step(run.state, tasks, torch.zeros(())).logs["loss"])
        for run in (plain, smooth, smoother)
    }
    assert len(losses) == 3
    with pytest.raises(UserError, match=r"loss\.inner_settings\.a: applies to loss\.inner"):
        make_run(*words, "+loss.inner_settings.a=1")


def test_a_loss_that_needs_labels_refuses_mixing(monkeypatch):
    monkeypatch.setitem(LOSSES["class"], "label_smoothing", cubic)
    words = ["algo=protonet", "+augment.mix.mixup={}", "loss.name=label_smoothing"]
    with pytest.raises(UserError, match=r"which loss\.name=label_smoothing cannot use"):
        check(checking.check_config(composition.compose_config(words)))
