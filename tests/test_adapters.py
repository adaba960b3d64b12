"""Check CAVIA, LoRA and Meta-Curvature against independent computations, in float64."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad

from metalearn.algorithms.cavia import CAVIA
from metalearn.algorithms.lora import LoRA
from metalearn.algorithms.maml import MAML
from metalearn.algorithms.meta_curvature import MetaCurvature
from metalearn.backbones.conv4 import Conv4
from metalearn.backbones.pretrained import Timm
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.types import Query, Spec, Support, Task
from tests.fixtures import to_float64
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

_CONV: Any = Conv4(
    filters=2, blocks=1, downsample="pool", output="flatten", normalisation="none",
    activation="tanh", eps=1e-5,
)  # fmt: skip


def expected_gradient(loss, state):
    """Return the gradient of a function of all parameters."""
    return grad(loss)(state.params)


def small_images():
    """Return a task of images [1, 4, 4] in two classes."""
    torch.manual_seed(0)
    y = torch.tensor([0, 1, 0, 1])
    parts = [(torch.randn(4, 1, 4, 4).double(), y) for _ in range(2)]
    return Task(Support(*parts[0], 2), Query(*parts[1]), KEY)


# CAVIA

_CONTEXT: dict[str, Any] = dict(
    num_context=3, inner_lr=0.5, inner_steps=2, test_inner_steps=2, first_order=False
)


def modulated(params, phi, x):
    """Compute the network of `one_task.NET` with its hidden layer scaled and shifted."""
    scale = params["context.norm0.scale"] @ phi
    shift = params["context.norm0.shift"] @ phi
    hidden = x @ params["net.linear0.weight"].T + params["net.linear0.bias"]
    hidden = torch.tanh(hidden * (1 + scale) + shift)
    return hidden @ params["head.weight"].T + params["head.bias"]


@pytest.mark.parametrize("first_order", [False, True])
def test_cavia_descends_on_the_context_alone(first_order):
    algorithm = CAVIA(**COMMON, **(_CONTEXT | {"first_order": first_order}))
    task, state = make_task(), init_state(algorithm)

    def adapted(params):
        phi = torch.zeros(3).double()
        for _ in range(2):
            at = {name: one.detach() for name, one in params.items()} if first_order else params
            start = phi.detach() if first_order else phi
            phi = phi - 0.5 * grad(
                lambda phi, at=at: F.cross_entropy(
                    modulated(at, phi, task.support.x), task.support.y
                )
            )(start)
        return phi

    def loss(params):
        return F.cross_entropy(modulated(params, adapted(params), task.query.x), task.query.y)

    torch.testing.assert_close(gradients(algorithm, state, task), expected_gradient(loss, state))
    phi = adapted(state.params)
    assert phi.abs().min() > 0
    expected = modulated(state.params, phi, task.query.x)
    torch.testing.assert_close(predictions(algorithm, state, task), expected)
    without = predictions(algorithm, state, task, steps=0)
    torch.testing.assert_close(without, network(state.params, task.query.x))


@pytest.mark.parametrize("statistics", ["query", "support", "support_plus_one", "population"])
def test_cavia_modulates_queries_after_every_kind_of_normalisation(statistics):
    common = COMMON | {"backbone": NORMALISED, "statistics": statistics}
    algorithm = CAVIA(**common, **_CONTEXT)
    task, state = make_task(), init_state(algorithm)
    learner = algorithm.adapt(state, task.support, key=KEY)
    film = {name[9:]: one for name, one in learner.params.items() if name.startswith("net.film.")}
    assert film["norm0.scale"].abs().min() > 0
    plain = MAML(**common, **GRADIENT)
    # The same network, with scale and shift in the weights of the normalisation.
    scale, shift = 1 + film["norm0.scale"], film["norm0.shift"]
    params = {name: one for name, one in learner.params.items() if "film" not in name}
    params["net.norm0.bias"] = params["net.norm0.bias"] * scale + shift
    params["net.norm0.weight"] = params["net.norm0.weight"] * scale
    expected = plain.predict(state, plain.adapted(params, task.support.x), task.query.x)
    torch.testing.assert_close(algorithm.predict(state, learner, task.query.x), expected)


def test_cavia_starts_with_scales_and_shifts_of_variance_one_over_their_number():
    net = dataclasses.replace(NORMALISED, hidden=[400])
    algorithm = CAVIA(**(COMMON | {"backbone": net}), **(_CONTEXT | {"num_context": 50}))
    params = init_state(algorithm).params
    for part in ("scale", "shift"):
        weight = params[f"context.norm0.{part}"]
        assert weight.shape == (400, 50) and abs(weight.std() * 20 - 1) < 0.05


def test_cavia_refuses_a_backbone_that_it_cannot_modulate():
    algorithm = CAVIA(**(COMMON | {"backbone": IDENTITY}), **_CONTEXT)
    with pytest.raises(UserError, match="backbone=MLP: has no layer that CAVIA can modulate"):
        init_state(algorithm)


# LoRA

_LOW_RANK: dict[str, Any] = GRADIENT | dict(rank=2, scale=0.7, layers="")


def lora(backbone=None, **changes):
    common = COMMON | ({"backbone": backbone} if backbone else {})
    return LoRA(**common, **(_LOW_RANK | changes))


def test_lora_descends_on_the_factors_and_the_head():
    algorithm = lora()
    task, state = make_task(), init_state(algorithm)
    up, down = "lora.linear0.weight.up", "lora.linear0.weight.down"
    assert state.params[up].shape == (5, 2) and state.params[down].shape == (2, 4)

    def output(params, x):
        weight = params["net.linear0.weight"].clone()
        product = torch.zeros_like(weight)
        for row, column in itertools.product(range(5), range(4)):
            product[row, column] = sum(
                params[up][row, rank] * params[down][rank, column] for rank in range(2)
            )
        return network(params | {"net.linear0.weight": weight + 0.7 * product}, x)

    def loss(params):
        for _ in range(2):
            gradient = grad(lambda p: F.cross_entropy(output(p, task.support.x), task.support.y))(
                params
            )
            params = params | {
                name: params[name] - 0.3 * gradient[name]
                for name in (up, down, "head.weight", "head.bias")
            }
        return F.cross_entropy(output(params, task.query.x), task.query.y)

    meta = gradients(algorithm, state, task)
    torch.testing.assert_close(meta, expected_gradient(loss, state))
    assert min(one.abs().max() for one in meta.values()) > 0


def test_lora_of_a_frozen_backbone_adapts_but_leaves_its_weights():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Frozen(Conv4):
        frozen: bool = True

        @property
        def is_frozen(self):  # type: ignore[override]
            return self.frozen

    open_, frozen = (
        lora(Frozen(**{**dataclasses.asdict(_CONV), "kernels": _CONV.kernels, "frozen": one}))
        for one in (False, True)
    )
    task, spec = small_images(), Spec((1, 4, 4), 2, 0, "class")
    state = to_float64(frozen.init(spec, prng.key_of(0)))
    assert state.params["lora.conv0.weight.down"].shape == (2, 9)
    adapted = [one.adapt(state, task.support, key=KEY).params for one in (open_, frozen)]
    torch.testing.assert_close(*adapted)
    change = adapted[1]["net.conv0.weight"] - state.params["net.conv0.weight"]
    assert torch.linalg.matrix_rank(change.flatten(1)) == 2
    meta = gradients(frozen, state, task)
    for name, value in gradients(open_, state, task).items():
        if name.startswith("net."):
            assert not meta[name].any() and value.any()
        elif name.startswith("lora."):
            assert meta[name].any()


def test_lora_changes_the_weights_that_layers_matches():
    names = {"": 1, "conv": 1, "0": 1}
    spec = Spec((1, 4, 4), 2, 0, "class")
    for layers, count in names.items():
        state = lora(_CONV, layers=layers).init(spec, prng.key_of(0))
        assert sum(name.endswith(".up") for name in state.params) == count
    with pytest.raises(UserError, match=r"algo\.layers=conv9: matches no weight.*conv0\.weight"):
        lora(_CONV, layers="conv9").init(spec, prng.key_of(0))
    with pytest.raises(UserError, match=r"algo\.layers=\(: should be a regular expression"):
        lora(_CONV, layers="(")


# Meta-Curvature


def curvature(backbone=None, **changes):
    common = COMMON | ({"backbone": backbone} if backbone else {})
    return MetaCurvature(**common, **(GRADIENT | {"inner_steps": 1} | changes))


def test_meta_curvature_of_identities_is_maml():
    algorithm = curvature(inner_steps=2)
    plain = MAML(**COMMON, **GRADIENT)
    task, state = make_task(), init_state(algorithm)
    start = type(state)(init_state(plain).params, state.buffers)
    own, others = gradients(algorithm, state, task), gradients(plain, start, task)
    for name, value in others.items():
        torch.testing.assert_close(own[name], value)


def test_meta_curvature_multiplies_every_mode_of_a_gradient():
    algorithm = curvature(_CONV)
    spec, task = Spec((1, 4, 4), 2, 0, "class"), small_images()
    state = to_float64(algorithm.init(spec, prng.key_of(0)))
    torch.manual_seed(1)
    for name in list(state.params):
        if name.startswith("curvature."):
            state.params[name] = torch.randn_like(state.params[name])
    shapes = {name[10:]: tuple(one.shape) for name, one in state.params.items() if "curv" in name}
    assert shapes == {
        "net.conv0.weight.0": (2, 2), "net.conv0.weight.1": (1, 1), "net.conv0.weight.2": (9, 9),
        "net.conv0.bias.0": (2,), "head.weight.0": (2, 2), "head.weight.1": (8, 8),
        "head.bias.0": (2,),
    }  # fmt: skip

    def output(params, x):
        z = torch.tanh(F.conv2d(x, params["net.conv0.weight"], params["net.conv0.bias"], padding=1))
        z = F.max_pool2d(z, 2).flatten(1)
        return z @ params["head.weight"].T + params["head.bias"]

    def loss(params):
        gradient = grad(lambda p: F.cross_entropy(output(p, task.support.x), task.support.y))(
            params
        )
        matrices = {name[10:]: one for name, one in params.items() if "curvature" in name}
        step = {
            "net.conv0.weight": torch.einsum(
                "ap,bq,cr,pqr->abc",
                *(matrices[f"net.conv0.weight.{mode}"] for mode in range(3)),
                gradient["net.conv0.weight"].reshape(2, 1, 9),
            ).reshape(2, 1, 3, 3),
            "head.weight": matrices["head.weight.0"]
            @ gradient["head.weight"]
            @ matrices["head.weight.1"].T,
            **{
                name: matrices[f"{name}.0"] * gradient[name]
                for name in ("net.conv0.bias", "head.bias")
            },
        }
        params = params | {name: params[name] - 0.3 * one for name, one in step.items()}
        return F.cross_entropy(output(params, task.query.x), task.query.y)

    torch.testing.assert_close(gradients(algorithm, state, task), expected_gradient(loss, state))


def test_lora_adapts_a_frozen_network_of_another_library():
    net = Timm(model="test_resnet", weights=None, frozen=True, image_size=32)
    algorithm = lora(net, layers="^conv1", inner_steps=1, test_inner_steps=1)
    algorithm = dataclasses.replace(algorithm, statistics="population")
    spec = Spec((3, 32, 32), 2, 0, "class")
    state = to_float64(algorithm.init(spec, prng.key_of(0)))
    torch.manual_seed(0)
    y = torch.tensor([0, 1])
    task = Task(Support(torch.rand(2, 3, 32, 32).double(), y, 2),
                Query(torch.rand(2, 3, 32, 32).double(), y), KEY)  # fmt: skip
    meta = gradients(algorithm, state, task)
    factors = {name: one for name, one in meta.items() if name.startswith("lora.")}
    assert factors and all(one.any() for one in factors.values())
    assert not any(one.any() for name, one in meta.items() if name.startswith("net."))
    params = algorithm.adapt(state, task.support, key=KEY).params
    changed = {
        name for name, one in params.items() if not torch.equal(one, state.params.get(name, one))
    }
    bodies = {f"net.{name[5:].rpartition('.')[0]}" for name in factors}
    assert bodies < changed and {name for name in changed if name.startswith("net.")} == bodies
    after, before = (predictions(algorithm, state, task, steps=steps) for steps in (1, 0))
    assert not torch.allclose(after, before)
