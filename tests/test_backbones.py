"""Backbones against independent computations."""

import pytest
import torch
from torch.func import grad, vmap

from metalearn import random
from metalearn.backbones import normalisation
from metalearn.backbones.conv4 import Conv4
from metalearn.backbones.mlp import MLP
from metalearn.errors import UserError
from metalearn.types import Kernels


def conv4(**changes):
    settings = dict(filters=6, blocks=3, downsample="pool", output="flatten", normalisation="batch", activation="relu")
    return Conv4(**(settings | {"eps": 1e-5} | changes))


def plain(x, weight, bias, eps=1e-5):
    """Batch normalisation from its definition."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    mean = x.mean(axes, keepdim=True)
    var = (x - mean).square().mean(axes, keepdim=True)
    shape = (1, -1) + (1,) * (x.dim() - 2)
    return (x - mean) / (var + eps).sqrt() * weight.view(shape) + bias.view(shape)


@pytest.mark.parametrize("mapped", [False, True])
def test_second_derivatives_of_normalisation_with_a_weight_of_each_task(mapped):
    torch.manual_seed(0)
    x, target = torch.randn(3, 5, 4, 2, 2).double(), torch.randn(3, 5, 4, 2, 2).double()
    weight, bias = torch.rand(3, 4).double() + 0.5, torch.randn(3, 4).double()

    def ours(x, w, b):
        kernels = Kernels(fused_norm=not mapped)
        return normalisation.normalise("n", {"n.weight": w, "n.bias": b}, x, None, False, 1e-5, kernels)[0]

    def meta_gradient(norm, x, target, weight, bias):
        def inner(parameters):
            return (norm(x, *parameters).tanh() - target).square().mean()

        def outer(parameters):
            for _ in range(2):
                step = grad(inner)(parameters)
                parameters = tuple(p - 0.5 * g for p, g in zip(parameters, step, strict=True))
            return inner(parameters)

        return grad(outer)((weight, bias))

    def of(norm):
        def one(*task):
            return meta_gradient(norm, *task)

        if mapped:
            return vmap(one)(x, target, weight, bias)
        return [
            torch.stack(parts)
            for parts in zip(*(one(*task) for task in zip(x, target, weight, bias, strict=True)), strict=True)
        ]

    for found, expected in zip(of(ours), of(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_given_statistics_of_a_batch_equal_its_own():
    net = conv4()
    params, _ = net.init((1, 16, 16), random.key_of(0))
    x = torch.randn(7, 1, 16, 16)
    own, collected = net.embed(params, x, collect=True)
    torch.testing.assert_close(net.embed(params, x, given=collected)[0], own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.embed(params, x[:2], given=collected)[0], own[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("downsample", ["pool", "stride"])
@pytest.mark.parametrize("output", ["flatten", "mean"])
@pytest.mark.parametrize("size", [28, 32, 21])
def test_size_is_the_size_of_an_embedding(downsample, output, size):
    net = conv4(downsample=downsample, output=output)
    params, _ = net.init((3, size, size), random.key_of(0))
    assert net.embed(params, torch.rand(2, 3, size, size))[0].shape == (2, net.size((3, size, size)))


def test_bias_stands_exactly_where_no_normalisation_follows():
    for net in (conv4(), MLP(hidden=[5, 4], normalisation="batch", activation="relu", eps=1e-5)):
        assert not any(
            name.startswith(("conv", "linear")) and "bias" in name
            for name in net.init((1, 16, 16), random.key_of(0))[0]
        )
    params, population = conv4(normalisation="none").init((1, 16, 16), random.key_of(0))
    assert sum("bias" in name for name in params) == 3
    assert population == {}


def test_too_small_pictures_are_refused():
    with pytest.raises(UserError, match="6x6"):
        conv4().size((1, 6, 6))
