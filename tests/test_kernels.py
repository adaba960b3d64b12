"""Own operators equal plain torch, with first and second derivatives, batched and not."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

from metalearn.engine import Engine, kernels
from metalearn.engine.kernels import build, convolutions, functions, ops, pooled
from metalearn.system.errors import UserError
from tests.fixtures import to_float64

_EPS = 1e-5
_HALF = torch.tensor(0.5)


def plain_block(x, weight, scale, shift, stride, slope):
    y = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2)
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0, keepdim=True)
    y = (y - mean) * torch.rsqrt(var + _EPS) * scale[:, None, None] + shift[:, None, None]
    return F.leaky_relu(y, slope)


def own_block(x, weight, scale, shift, stride, slope):
    return kernels.block(x, weight, scale, shift, stride, _EPS, slope)


def own_unfused(x, weight, scale, shift, stride, slope):
    y = kernels.convolution(x, weight, stride)
    y = functions.norm(y.permute(0, 2, 3, 1), scale, shift, _EPS, slope)[0]
    return y.permute(0, 3, 1, 2)


shapes = st.fixed_dictionaries(
    {
        "channels": st.sampled_from([1, 2, 3, 5]),
        "out": st.sampled_from([1, 3, 16, 17, 33, 64, 70]),
        "size": st.sampled_from([1, 3, 5]),
        "height": st.integers(3, 9),
        "width": st.integers(3, 9),
        "stride": st.sampled_from([1, 2]),
        "slope": st.sampled_from([0.0, 0.01, 1.0]),
        "images": st.integers(1, 4),
        "large": st.sampled_from([0, 30, 10**6]),
    }
)


def case(shape, dtype, tasks=2):
    """Return inputs [T, B, C, H, W] of two sets, and the parameters of one block."""
    g = torch.Generator().manual_seed(hash(tuple(shape.values())) % 2**31)
    x = torch.rand(
        2, tasks, shape["images"], shape["channels"], shape["height"], shape["width"],
        generator=g, dtype=torch.float64,
    )  # fmt: skip
    weight = torch.randn(
        shape["out"], shape["channels"], shape["size"], shape["size"], generator=g, dtype=x.dtype
    )
    scale = 0.5 + torch.rand(shape["out"], generator=g, dtype=x.dtype)
    shift = 0.3 * torch.randn(shape["out"], generator=g, dtype=x.dtype)
    return x.to(dtype), [value.to(dtype) for value in (weight, scale, shift)]


def derivatives(block, x, params, stride, slope):
    """Return first derivatives by everything, and those after a gradient step per task."""

    def loss(x, *params):
        y = block(x, *params, stride, slope)
        return (
            y.sin() * torch.linspace(0.5, 1.5, len(y), dtype=y.dtype)[:, None, None, None]
        ).sum()

    leaves = [value.clone().requires_grad_() for value in (x[0, 0], *params)]
    first = torch.autograd.grad(loss(*leaves), leaves)

    def after_a_step(support, query, *params):
        gradients = grad(loss, (1, 2, 3))(support, *params)
        adapted = [p - 0.01 * gradient for p, gradient in zip(params, gradients, strict=True)]
        return loss(query, *adapted)

    leaves = [value.clone().requires_grad_() for value in (*x, *params)]
    value = vmap(after_a_step, (0, 0, None, None, None))(*leaves).sum()
    return [*first, *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("own", [own_block, own_unfused])
@given(shape=shapes)
@settings(max_examples=15, deadline=None)
def test_derivatives_equal_those_of_plain_torch(own, shape):
    x, params = case(shape, torch.float64)
    own = mock.patch.object(convolutions, "_LARGE", shape["large"])(own)  # each form of products
    # Away from equal inputs: there 1 / sqrt(var + eps) amplifies rounding.
    expected = derivatives(plain_block, x, params, shape["stride"], shape["slope"])
    for mine, plain in zip(
        derivatives(own, x, params, shape["stride"], shape["slope"]), expected, strict=True
    ):
        torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-7 * plain.abs().max().item())


@given(shape=shapes)
@settings(max_examples=25, deadline=None)
def test_c_operators_equal_those_in_torch(library, shape):
    """Each operator on its own, in float32, so that no derivative amplifies its rounding."""
    x, (weight, scale, shift) = case(shape, torch.float32)
    x, stride, slope = x[0].permute(0, 1, 3, 4, 2), shape["stride"], shape["slope"]
    shared = weight.permute(2, 3, 1, 0)
    for w in (shared, shared + 0.1 * torch.rand(2, *shared.shape)):
        lead = w.dim() - 4
        g, b = (value.expand(2, -1) if lead else value for value in (scale, shift))
        y = compare("conv", x, w, stride)[0]
        compare("conv_input", y, w, *x.shape[2:4], stride)
        compare("conv_weight", x, y, shape["size"], stride, lead)
        a, xh, r = compare("norm", y, g, b, _EPS, slope)
        ga, gxh, gr = (torch.randn_like(value) for value in (a, xh, r))
        gy, _, _ = compare("norm_vjp", ga, None, None, g, a, xh, r, slope, lead)
        compare("norm_vjp", ga, gxh, gr, g, a, xh, r, slope, lead)
        compare("norm_second", gy, g, b, ga, g, a, xh, r, slope, lead)
    p = compare("patches", x, shape["size"], stride)[0]
    compare("moments", p)
    for v in (torch.randn(p.shape[-1], shape["out"]), torch.randn(2, p.shape[-1], shape["out"])):
        z = compare("affine", p, v, None, slope)[0]
        compare("affine", p, v, torch.randn_like(z), slope)
        compare("affine_weight", p, torch.randn_like(z), z, slope, v.dim() - 2)


@given(
    st.sampled_from([16, 17, 40]), st.sampled_from([16, 33, 64]), st.integers(6, 13),
    st.integers(6, 13), st.integers(1, 4), st.booleans(),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_products_of_tiles_equal_convolutions(library, channels, out, height, width, images, own):
    """In C, 3 x 3 filters with stride 1 have an algorithm of their own for large images."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    x, y = normal(3, images, height, width, channels), normal(3, images, height, width, out)
    w = normal(*[3][: int(own)], 3, 3, channels, out)
    calls = {
        "conv": (x, w, 1),
        "conv_input": (y, w, height, width, 1),
        "conv_weight": (x, y, 3, 1, int(own)),
    }
    for name, args in calls.items():
        (together,) = compare(name, *args)
        if name != "conv_weight":
            alone = (one[:1] if torch.is_tensor(one) and one.dim() == 5 else one for one in args)
            assert torch.equal(ops.ON_CPU[name](*alone), together[:1]), "depends on other tasks"


def compare(name, *args):
    """Return the outputs of an operator in C, after comparing them with those in torch."""
    exact = [
        arg.double() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg
        for arg in args
    ]
    mine, expected = ops.ON_CPU[name](*args), ops.ON_CPU[name](*exact)
    mine, expected = ((one,) if isinstance(one, torch.Tensor) else one for one in (mine, expected))
    for one, other in zip(mine, expected, strict=True):
        scale = other.abs().max().item() or 1.0
        torch.testing.assert_close(
            one.double(), other, rtol=1e-4, atol=2e-5 * scale, msg=lambda text: f"{name}: {text}"
        )
    return mine


def test_nan_stays_nan(either):
    x, weight = torch.rand(3, 16, 5, 5), torch.rand(16, 16, 3, 3)
    one, zero = torch.ones(16), torch.zeros(16)
    x[0, 0, 0, 0] = torch.nan
    assert own_block(x, weight, one, zero, 2, 0.0).isnan().any()
    assert own_block(x[:, :1], weight[:, :1], one, zero, 2, 0.0).isnan().any()


@pytest.mark.parametrize("channels", [1, 8])
def test_third_derivatives_are_refused(channels):
    x, weight = torch.rand(2, channels, 4, 4), torch.rand(8, channels, 3, 3)
    scale = torch.ones(8, requires_grad=True)

    def value(scale):
        y = functions.norm(
            kernels.convolution(x, weight, 1).permute(0, 2, 3, 1), scale, scale, _EPS, 0.0
        )[0]
        return y.pow(4).sum()

    first = torch.autograd.grad(value(scale), scale, create_graph=True)[0].square().sum()
    second = torch.autograd.grad(first, scale, create_graph=True)[0].square().sum()
    with pytest.raises(NotImplementedError, match="third derivatives"):
        torch.autograd.grad(second, scale)


#: Arguments of each operator: B=3, H=W=5, C=4, O=6, K=3; two tasks.
_X, _W, _Y, _G, _ROWS = (2, 3, 5, 5, 4), (2, 3, 3, 4, 6), (2, 3, 3, 3, 6), (2, 6), (2, 27, 37)
_POOLED = (2, 3, 1, 1, 6)
_ARGUMENTS: dict[str, list[Any]] = {
    "patches": [_X, 3, 2],
    "moments": [_ROWS],
    "conv": [_X, _W, 2],
    "conv_input": [_Y, _W, 5, 5, 2],
    "conv_weight": [_X, _Y, 3, 2, 1],
    "norm": [_Y, _G, _G, _EPS, 0.0],
    "norm_vjp": [_Y, _Y, _G, _G, _Y, _Y, _G, 0.0, 1],
    "norm_second": [_Y, _G, _G, _Y, _G, _Y, _Y, _G, 0.0, 1],
    "affine": [_ROWS, (2, 37, 6), (2, 27, 6), 0.0],
    "affine_weight": [_ROWS, (2, 27, 6), (2, 27, 6), 0.0, 1],
    "norm_pool": [_Y, _G, _G, _EPS, 0.0],
    "norm_pool_vjp": [_POOLED, _G, _G, _G, _Y, _POOLED, _POOLED, _POOLED, _G, _G, _EPS, 0.0, 1],
    "affine_pool": [_ROWS, (2, 37, 6), 3, 3, 0.0],
    "affine_pool_weight": [_ROWS, _POOLED, _POOLED, _POOLED, 3, 3, 0.0, 1],
}


@pytest.mark.parametrize("name", ops.ON_CPU)
def test_torch_implementation_reads_no_value_on_the_host(name, monkeypatch):
    """It runs on the `meta` device, and there gives the same shapes and strides as on a CPU.

    The implementation in C gives the same shapes, but has its own layout of gradients of weights.
    """

    def outputs(device):
        args = [
            torch.rand(arg, device=device) if isinstance(arg, tuple) else arg
            for arg in _ARGUMENTS[name]
        ]
        return [
            (one.device.type, one.shape, one.dtype, one.stride())
            for one in pytree.tree_leaves(getattr(torch.ops.metalearn, name)(*args))
        ]

    on_meta = outputs("meta")
    assert [one[1:3] for one in on_meta] == [one[1:3] for one in outputs("cpu")]
    monkeypatch.setattr(build._State, "library", None)
    assert on_meta == [("meta", *one[1:]) for one in outputs("cpu")]


def test_without_a_compiler_torch_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(build._State, "library", None)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    build.load(tmp_path)
    assert build.library() is None and build.reason() == "no C compiler"
    assert convolutions.conv(torch.ones(1, 2, 2, 3), torch.ones(1, 1, 3, 4), 1).eq(3).all()


def test_failed_compilation_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(build._State, "library", None)
    monkeypatch.setattr(build, "_FOLDER", tmp_path)
    (tmp_path / "wrong.c").write_text("this is no C")
    build._key.cache_clear()
    try:
        build.load(tmp_path / "cache")
    finally:
        build._key.cache_clear()
    assert build.library() is None and "failed" in build.reason()
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("query", [1, 15])
@pytest.mark.parametrize("backbone", [[], ["backbone.downsample=stride", "backbone.output=mean"]])
def test_engine_with_own_operators_equals_the_loop(query, backbone, make_run):
    run = make_run(
        "algo=maml", "algo.inner_steps=2", "train.meta_batch=4", f"episode.train.query={query}",
        *backbone,
    )  # fmt: skip
    state, tasks = to_float64(run.state), to_float64(run.train.draw(0, 4))
    step, expected = (
        Engine(run.algorithm, strategy, 2, convolution=convolution).step(state, tasks, _HALF)
        for strategy, convolution in (("vmap", "direct"), ("loop", "plain"))
    )
    for name, value in expected.gradients.items():
        torch.testing.assert_close(step.gradients[name], value, rtol=1e-6, atol=1e-9)


def test_own_operators_are_exact_in_float32(either, make_run):
    """Sums that depend on the batch have errors of 1e-3 where the implementation is careless."""
    run = make_run(
        "algo=maml", "train.meta_batch=4", "episode.train.query=5",
        "backbone.downsample=stride", "backbone.output=mean",
    )  # fmt: skip
    tasks = run.train.draw(0, 4)
    step = run.train_engine.step(run.state, tasks, _HALF).gradients
    exact = Engine(run.algorithm, "loop", 1).step(
        to_float64(run.state), to_float64(tasks), _HALF.double()
    )
    for name, value in exact.gradients.items():
        error = (step[name].double() - value).norm() / value.norm()
        assert error < 2e-5, (name, error)


def test_auto_uses_own_operators_for_methods_that_iterate(either, make_run):
    maml = make_run("algo=maml", "train.meta_batch=4").train_engine
    assert (maml.strategy, maml.convolution) == ("vmap", "direct")
    for pool, convolution in (("pool", "direct"), ("stride", "plain")):
        words = ["algo=protonet", "train.meta_batch=4", f"backbone.downsample={pool}"]
        assert make_run(*words).train_engine.convolution == convolution
    assert make_run("algo=maml", "engine.precision=mixed").train_engine.convolution == "plain"
    with pytest.raises(UserError, match=r"engine\.convolution=direct"):
        make_run("algo=fomaml", "engine.precision=bf16", "engine.convolution=direct")


def pooled_by_torch(y, g, b, eps, slope):
    var, mean = torch.var_mean(y, (-4, -3, -2), correction=0, keepdim=True)
    z = (y - mean) * torch.rsqrt(var + eps) * g + b
    a = F.max_pool2d(torch.where(z > 0, z, slope * z).flatten(0, -4).movedim(-1, 1), 2)
    a = a.movedim(1, -1).unflatten(0, y.shape[:-3])
    return a, mean.flatten(-4), var.flatten(-4)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(2, 5), st.integers(2, 5),
    st.sampled_from([1, 7, 64, 70]), st.sampled_from([0.0, 0.01, 1.0]), st.integers(0, 99),
)  # fmt: skip
def test_pooling_first_equals_pooling_last(tasks, batch, height, width, channels, slope, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    y, g, b = normal(tasks, 2 * batch, height, width, channels), normal(channels), normal(channels)
    inputs = [value.requires_grad_() for value in (y, g, b)]

    def results(function, arguments):
        outputs = [function(*arguments, 1e-5, slope)[index] for index in function_outputs[function]]
        cotangents = [torch.ones_like(value).cumsum(0).to(value) for value in outputs]
        return outputs, torch.autograd.grad(outputs, arguments, cotangents)

    function_outputs = {pooled_by_torch: (0, 1, 2), pooled.norm_pool: (0, 3, 4)}
    expected = results(pooled_by_torch, [y, g, b])
    torch.testing.assert_close(results(pooled.norm_pool, inputs), expected)
    single = [value.detach().float().requires_grad_() for value in inputs]
    torch.testing.assert_close(
        pytree.tree_map(torch.Tensor.double, results(pooled.norm_pool, single)),
        expected, rtol=1e-3, atol=1e-3,
    )  # fmt: skip


def test_second_derivative_of_pooled_blocks_is_refused():
    y, g = torch.randn(2, 4, 4, 3, requires_grad=True), torch.ones(3)
    a = pooled.norm_pool(y, g, g, 1e-5, 0.0)[0]
    (gradient,) = torch.autograd.grad(a.square().sum(), y, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives of blocks with pooling"):
        gradient.sum().backward()


@pytest.mark.parametrize("statistics", ["query", "support", "population"])
@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_pooled_blocks_equal_plain_ones(strategy, statistics, either, make_run):
    run = make_run("algo=protonet", f"statistics={statistics}", "backbone.activation=leaky_relu")
    params = {
        name: value * torch.tensor([1.0, -1.0]).repeat(len(value) // 2)
        if "norm" in name and name.endswith("weight") else value
        for name, value in run.state.params.items()
    }  # fmt: skip
    state = run.state._replace(params=params)
    tasks = run.train.draw(0, 4)
    direct, plain = (
        Engine(run.algorithm, strategy, 2 if strategy == "vmap" else 1, convolution=one)
        for one in ("direct", "plain")
    )
    assert direct.is_pooled
    exact = plain.step(to_float64(state), to_float64(tasks), _HALF.double())
    step = direct.step(state, tasks, _HALF)
    for part in ("gradients", "statistics", "losses"):
        torch.testing.assert_close(
            pytree.tree_map(torch.Tensor.double, getattr(step, part)), getattr(exact, part),
            rtol=1e-3, atol=1e-4,
        )  # fmt: skip
    expected = plain.predictions(to_float64(state), to_float64(tasks))
    torch.testing.assert_close(direct.predictions(state, tasks).double(), expected,
                               rtol=1e-3, atol=1e-3)  # fmt: skip
