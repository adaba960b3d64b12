"""Backbones against independent computations."""

import dataclasses
import hashlib
import json
import math
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.func import grad, vmap

import metalearn
from metalearn.backbones import layers, normalisation, resnet18
from metalearn.backbones.conv4 import Conv4
from metalearn.backbones.mlp import MLP
from metalearn.backbones.r2d2_conv import R2D2Conv
from metalearn.backbones.resnet12 import ResNet12
from metalearn.backbones.resnet18 import ResNet18
from metalearn.config import checking, composition
from metalearn.report.progress import SILENT
from metalearn.run import loop
from metalearn.run.build import build
from metalearn.run.evaluate import evaluate
from metalearn.run.train import train
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.types import InputSpec, Kernels
from tests.fixtures import to_float64


def conv4(**changes):
    settings: dict[str, Any] = dict(
        filters=6,
        blocks=3,
        halvings=None,
        downsample="pool",
        output="flatten",
        normalisation="batch",
        activation="relu",
    )
    return Conv4(**(settings | {"eps": 1e-5} | changes))


def r2d2_conv(**changes):
    settings: dict[str, Any] = {"filters": [4, 5, 6, 7], "dropout": 0.0, "eps": 1e-5}
    return R2D2Conv(**(settings | changes))


def resnet12(**changes):
    settings: dict[str, Any] = dict(
        filters=[3, 4, 5, 6], output="mean", dropout=0.0, drop_block=False, block_size=2, eps=1e-5
    )
    return ResNet12(**(settings | changes))


def batch_norm(x, weight, bias, eps=1e-5):
    """Compute batch normalisation from its definition."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    mean = x.mean(axes, keepdim=True)
    var = (x - mean).square().mean(axes, keepdim=True)
    shape = (1, -1) + (1,) * (x.dim() - 2)
    return (x - mean) / (var + eps).sqrt() * weight.view(shape) + bias.view(shape)


@pytest.mark.parametrize("mapped", [False, True])
def test_second_derivatives_of_normalisation_with_weights_per_task(mapped):
    torch.manual_seed(0)
    x, target = torch.randn(3, 5, 4, 2, 2).double(), torch.randn(3, 5, 4, 2, 2).double()
    weight, bias = torch.rand(3, 4).double() + 0.5, torch.randn(3, 4).double()

    def normaliser(x, w, b):
        kernels = Kernels(fused_norm=not mapped)
        return normalisation.Normaliser({"n.weight": w, "n.bias": b}, kernels=kernels)("n", x)

    def meta_gradient(norm, x, target, weight, bias):
        def inner(parameters):
            return (norm(x, *parameters).tanh() - target).square().mean()

        def outer(parameters):
            for _ in range(2):
                step = grad(inner)(parameters)
                parameters = tuple(p - 0.5 * g for p, g in zip(parameters, step, strict=True))
            return inner(parameters)

        return grad(outer)((weight, bias))

    def meta_gradients(norm):
        def one(*task):
            return meta_gradient(norm, *task)

        if mapped:
            return vmap(one)(x, target, weight, bias)
        return [
            torch.stack(parts)
            for parts in zip(
                *(one(*task) for task in zip(x, target, weight, bias, strict=True)), strict=True
            )
        ]

    for actual, expected in zip(
        meta_gradients(normaliser), meta_gradients(batch_norm), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_normalisation_is_accurate_if_most_values_are_equal(layout):
    torch.manual_seed(0)
    shape = (20, 8, 14, 14)
    background = torch.randn(1, 8, 1, 1).expand(shape)
    x = torch.where(torch.rand(20, 1, 14, 14) < 0.8, background, torch.randn(shape))
    factors, direction = torch.randn(2, *shape)
    affine = {"n.weight": torch.rand(8) + 0.5, "n.bias": torch.randn(8)}

    def results(dtype):
        params = {name: value.to(dtype).requires_grad_() for name, value in affine.items()}
        images = x.to(dtype).contiguous(memory_format=layout).requires_grad_()
        y = normalisation.Normaliser(params, kernels=Kernels(fused_norm=True))("n", images)
        inputs = (images, *params.values())
        loss = (y.tanh() * factors).sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad((first[0] * direction).sum(), inputs)
        return [value.detach().double() for value in (y, *first, *second)]

    for actual, exact in zip(results(torch.float32), results(torch.float64), strict=True):
        assert (actual - exact).norm() < 5e-6 * exact.norm()


def test_given_statistics_of_a_batch_equal_its_statistics():
    net = conv4()
    params, _ = net.init(InputSpec((1, 16, 16)), prng.key_of(0))
    x = torch.randn(7, 1, 16, 16)
    z, statistics = net.embed(params, x, collect=True)
    torch.testing.assert_close(net.embed(params, x, given=statistics)[0], z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        net.embed(params, x[:2], given=statistics)[0], z[:2], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("downsample", ["pool", "stride"])
@pytest.mark.parametrize("output", ["flatten", "mean"])
@pytest.mark.parametrize("size", [28, 32, 21])
@pytest.mark.parametrize("halvings", [None, 2, 0])
def test_shape_is_the_shape_of_the_embedding(downsample, output, size, halvings):
    net = conv4(downsample=downsample, output=output, halvings=halvings)
    params, _ = net.init(InputSpec((3, size, size)), prng.key_of(0))
    shape = net.shape(InputSpec((3, size, size)))
    z = net.embed(params, torch.rand(2, 3, size, size))[0]
    assert z.shape == (2, math.prod(shape))
    sides = [
        size // 2**block if downsample == "pool" else -(-size // 2**block) for block in range(4)
    ]
    side = sides[3 if halvings is None else halvings]
    assert shape == ((6, side, side) if output == "flatten" else (6,))


@pytest.mark.parametrize("net", [r2d2_conv(), resnet12(), resnet12(output="flatten")])
@pytest.mark.parametrize("size", [28, 32, 21])
def test_shape_of_larger_networks(net, size):
    params, _ = net.init(InputSpec((3, size, size)), prng.key_of(0))
    assert net.embed(params, torch.rand(2, 3, size, size))[0].shape == (
        2,
        math.prod(net.shape(InputSpec((3, size, size)))),
    )


def layer(params, name, stride=1):
    """Build torch's convolution and normalisation with the weights of one layer."""
    weight = params[f"conv{name}.weight"]
    out, channels, size = weight.shape[:3]
    convolution, norm = (
        nn.Conv2d(channels, out, size, stride, size // 2, bias=False),
        nn.BatchNorm2d(out),
    )
    convolution.weight.data, norm.weight.data, norm.bias.data = (
        weight, params[f"norm{name}.weight"], params[f"norm{name}.bias"],
    )  # fmt: skip
    return nn.Sequential(convolution, norm)


def perturb(params):
    """Add noise to all parameters, so that normalisations differ from weight 1 and bias 0."""
    torch.manual_seed(1)
    return {name: value + 0.2 * torch.randn_like(value) for name, value in params.items()}


def test_r2d2_conv_concatenates_the_last_two_of_four_blocks():
    net = r2d2_conv()
    params = perturb(net.init(InputSpec((3, 32, 32)), prng.key_of(0))[0])
    x = torch.randn(5, 3, 32, 32)
    outputs = [x]
    for block, stride in enumerate((2, 2, 2, 1)):
        blocks = nn.Sequential(
            layer(params, str(block)), nn.MaxPool2d(2, stride), nn.LeakyReLU(0.1)
        )
        outputs.append(blocks(outputs[-1]))
    expected = torch.cat([nn.MaxPool2d(2, 1)(outputs[3]).flatten(1), outputs[4].flatten(1)], 1)
    torch.testing.assert_close(net.embed(params, x)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "features"), [(28, 3584), (32, 8064), (84, 72576)])
def test_r2d2_conv_has_the_number_of_features_of_the_authors_code(size, features):
    net = R2D2Conv(filters=[96, 192, 384, 512], dropout=0.1, eps=1e-5)
    assert net.shape(InputSpec((3, size, size))) == (features,)


def test_resnet12_is_four_residual_blocks():
    net = resnet12()
    params = perturb(net.init(InputSpec((3, 32, 32)), prng.key_of(0))[0])
    x = torch.randn(5, 3, 32, 32)
    z = x
    for block in range(4):
        act = nn.LeakyReLU(0.1)
        residual = layer(params, f"{block}_2")(
            act(layer(params, f"{block}_1")(act(layer(params, f"{block}_0")(z))))
        )
        z = nn.MaxPool2d(2)(act(residual + layer(params, f"{block}_beside")(z)))
    torch.testing.assert_close(net.embed(params, x)[0], z.mean((-2, -1)), rtol=1e-4, atol=1e-5)


@pytest.fixture
def torchvision_weights(tmp_path):
    """Return torchvision's network with random weights and statistics, and a file of them."""
    torch.manual_seed(0)
    import torchvision  # slow to import

    net = torchvision.models.resnet18()
    net.fc = nn.Identity()
    for name, value in net.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            value.normal_(0, 0.1)
        elif name.endswith("running_var") or ("bn" in name and name.endswith("weight")):
            value.uniform_(0.5, 1.5)
    path = tmp_path / "resnet18.pth"
    torch.save(net.state_dict(), path)
    return net, path


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, pytest.param(84, marks=pytest.mark.slow)])
def test_resnet18_equals_torchvision(torchvision_weights, size):
    theirs, path = torchvision_weights
    ours = ResNet18(weights=str(path), frozen=False, eps=1e-5)
    params, population = ours.init(InputSpec((3, size, size)), prng.key_of(0))
    x = torch.randn(4, 3, size, size)
    with torch.no_grad():
        inductive = theirs.eval()(x)
        transductive = theirs.train()(x)
    torch.testing.assert_close(
        ours.embed(params, x, given=population)[0], inductive, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(ours.embed(params, x)[0], transductive, rtol=1e-3, atol=1e-3)
    assert inductive.shape[1:] == ours.shape(InputSpec((3, size, size)))


def compose_resnet18(cache_dir, *overrides):
    small = [
        "dataset=glyphs",
        "dataset.num_classes=60",
        "dataset.image_size=32",
        "episode.query=1",
        "train.batch_size=4",
        "train.steps=2",
    ]
    few = [
        "val.episodes=2",
        "test.episodes=2",
        "train.meta_batch=1",
        f"cache_dir={cache_dir}",
        "logger=none",
    ]
    return composition.compose_config(["backbone=resnet18", *small, *few, *overrides])


def resnet18_settings(cache_dir, *overrides):
    return checking.check_config(compose_resnet18(cache_dir, *overrides))


@pytest.mark.slow
def test_trained_run_does_not_need_its_source_files(torchvision_weights, cache_dir, tmp_path):
    weights, choices, console = torchvision_weights[1], tmp_path / "engine.json", Console()
    overrides = ["algo=protonet", f"backbone.weights={weights}"]
    choices.write_text(json.dumps(build(resnet18_settings(cache_dir, *overrides)).choices))
    composed = compose_resnet18(cache_dir, *overrides, f"engine.choices={choices}")
    train(composed, tmp_path / "run", "protonet glyphs", overrides, console)
    weights.unlink()
    choices.unlink()
    assert metalearn.load(tmp_path / "run").spec.way == 5
    # With a different dataset, evaluation also reads the classes of the run's dataset.
    for overrides in ([], ["dataset.jitter=0.9"]):
        evaluate(tmp_path / "run", overrides, "test", None, console)
    assert len(list((tmp_path / "run/evaluations").glob("*.json"))) == 4


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["relation", "baseline", "maml", "finetune"])
def test_frozen_weights_and_their_statistics_never_change(
    algo, torchvision_weights, cache_dir, tmp_path
):
    overrides = [
        f"algo={algo}",
        "statistics=population",
        f"backbone.weights={torchvision_weights[1]}",
    ]
    overrides += ["algo.test_inner_steps=5"] if algo == "finetune" else []
    changed = {}
    for frozen in ("true", "false"):
        run = build(resnet18_settings(cache_dir, *overrides, f"backbone.frozen={frozen}"))
        before = {name: value.clone() for part in run.state for name, value in part.items()}
        (tmp_path / frozen).mkdir()
        state = loop.fit(run, SILENT, tmp_path / frozen).state
        task = run.test.draw(0, 1)
        learner = run.algorithm.adapt(
            state,
            dataclasses.replace(task.support, x=task.support.x[0], y=task.support.y[0]),
            key=task.key[0],
        )
        adapted = getattr(learner, "params", {})
        after = {name: value for part in state for name, value in part.items()}
        changed[frozen] = {
            name for name, value in after.items() if not torch.equal(value, before[name])
        }
        changed[frozen] |= {
            name
            for name in adapted
            if not torch.equal(adapted[name], state.params.get(name, adapted[name]))
        }
    assert not [name for name in changed["true"] if name.startswith("net.")]
    assert {"net.conv_stem.weight", "net.norm_stem.mean"} <= changed["false"]


@pytest.mark.slow
def test_run_with_nothing_to_learn_is_refused_in_training_but_can_be_tested(cache_dir):
    with pytest.raises(UserError, match=r"train\.steps=0"):
        build(resnet18_settings(cache_dir, "algo=protonet", "backbone.frozen=true"))
    assert build(
        resnet18_settings(cache_dir, "algo=protonet", "backbone.frozen=true", "train.steps=0")
    ).state.params


@pytest.mark.slow
def test_mismatched_weights_are_refused(torchvision_weights, tmp_path):
    key = prng.key_of(0)
    weights = torch.load(torchvision_weights[1])
    cases = {
        "conv1.weight is missing": {
            name: value for name, value in weights.items() if name != "conv1.weight"
        },
        "conv1.weight is of shape": weights | {"conv1.weight": torch.zeros(64, 1, 7, 7)},
        "should be a state dict": [1, 2],
    }
    for number, (message, content) in enumerate(cases.items()):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path)
        with pytest.raises(UserError, match=message):
            ResNet18(weights=str(path), frozen=False, eps=1e-5).init(InputSpec((3, 32, 32)), key)
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("text.pth", "absent.pth"):
        with pytest.raises(UserError, match=name):
            ResNet18(weights=str(tmp_path / name), frozen=False, eps=1e-5).init(
                InputSpec((3, 32, 32)), key
            )


@pytest.mark.slow
def test_torchvision_weights_are_downloaded_once_and_checked(
    torchvision_weights, server, tmp_path, monkeypatch
):
    address, folder = server
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    content = torchvision_weights[1].read_bytes()
    name = f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (folder / name).write_bytes(content[:-1])
    net = ResNet18(weights="imagenet", frozen=True, eps=1e-5)
    monkeypatch.setattr(resnet18, "_address", lambda: f"{address}/{name}")
    with pytest.raises(UserError, match=r"invalid hash.*backbone\.weights"):
        net.init(InputSpec((3, 32, 32)), prng.key_of(0))
    (folder / name).write_bytes(content)
    first, _ = net.init(InputSpec((3, 32, 32)), prng.key_of(0))
    (folder / name).unlink()
    again, _ = net.init(InputSpec((3, 32, 32)), prng.key_of(1))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_dropout_and_drop_block_preserve_the_mean():
    x = torch.ones(8, 6, 20, 20)
    for noise in (
        lambda key: layers.dropout(x, 0.2, key),
        lambda key: layers.drop_block(x, 0.2, 5, key),
    ):
        outputs = torch.stack([noise(prng.key_of(number)) for number in range(20)])
        assert abs(outputs.mean().item() - 1) < 0.01
        assert 0.15 < (outputs == 0).double().mean().item() < 0.22
        assert not torch.equal(outputs[0], outputs[1])
        torch.testing.assert_close(noise(prng.key_of(3)), outputs[3])


def test_drop_block_drops_squares():
    x = torch.ones(1, 200, 12, 12)
    dropped = layers.drop_block(x, 0.02, 3, prng.key_of(0)) == 0
    # A corner drops its full square, so each dropped pixel is in a dropped 3x3 square.
    squares = dropped.unfold(2, 3, 1).unfold(3, 3, 1).all(-1).all(-1).to(torch.float32)
    covered = torch.nn.functional.max_pool2d(torch.nn.functional.pad(squares, [2] * 4), 3, 1) > 0
    assert dropped.any() and torch.equal(covered, dropped)
    assert not layers.drop_block(torch.ones(9, 9, 2, 2), 0.5, 5, prng.key_of(0)).isnan().any()


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["protonet", "maml"])
@pytest.mark.parametrize("backbone", ["r2d2_conv", "resnet12"])
def test_noise_depends_on_the_task_and_only_in_meta_training(backbone, algo, make_run):
    noisy = ["backbone.filters=[3,4,5]", "backbone.dropout=0.3", "statistics=population"]
    noisy += ["backbone.drop_block=true", "backbone.block_size=2"] if backbone == "resnet12" else []
    run = make_run(f"algo={algo}", f"backbone={backbone}", *noisy)
    tasks, state, half = (
        to_float64(run.train.draw(0, 3)),
        to_float64(run.state),
        torch.tensor(0.5).double(),
    )

    def step(strategy, tasks, backbone=run.algorithm.backbone):
        algorithm = dataclasses.replace(run.algorithm, backbone=backbone)
        return (
            dataclasses.replace(run.train_engine, algorithm=algorithm, strategy=strategy)
            .step(state, tasks, half)
            .logs["loss"]
        )

    first = step("vmap", tasks)
    torch.testing.assert_close(step("loop", tasks), first, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(step("loop", dataclasses.replace(tasks, key=tasks.key + 1)), first)
    assert not torch.allclose(
        step("loop", tasks, dataclasses.replace(run.algorithm.backbone, dropout=0.0)), first
    )
    quiet = dataclasses.replace(
        run.algorithm, backbone=dataclasses.replace(run.algorithm.backbone, dropout=0.0)
    )
    predictions = [
        dataclasses.replace(run.test_engine, algorithm=one).predictions(
            state, to_float64(run.test.draw(0, 2))
        )
        for one in (run.algorithm, quiet)
    ]
    assert torch.equal(*predictions)


def test_layers_have_a_bias_exactly_if_no_normalisation_follows():
    for net in (conv4(), MLP(hidden=[5, 4], normalisation="batch", activation="relu", eps=1e-5)):
        assert not any(
            name.startswith(("conv", "linear")) and "bias" in name
            for name in net.init(InputSpec((1, 16, 16)), prng.key_of(0))[0]
        )
    params, population = conv4(normalisation="none").init(InputSpec((1, 16, 16)), prng.key_of(0))
    assert sum("bias" in name for name in params) == 3
    assert population == {}


def test_too_small_images_are_refused():
    with pytest.raises(UserError, match="6x6"):
        conv4().shape(InputSpec((1, 6, 6)))
