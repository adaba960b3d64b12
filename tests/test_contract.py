"""The checks of `metalearn.testing` on every method, dataset and backbone in conf/."""

import functools
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from metalearn import load, testing
from metalearn.backbones.text import HashedTokens
from metalearn.config import checking, choices, components, composition
from metalearn.engine import Engine
from metalearn.run.build import build
from metalearn.run.evaluate import evaluate
from metalearn.run.train import train
from metalearn.system.errors import UserError
from metalearn.tasks.sampling import Shape
from metalearn.tasks.types import InputSpec
from metalearn.testing import BACKBONE_CHECKS, DATASET_CHECKS, METHOD_CHECKS
from tests.fixtures import ALGORITHMS, to_float64
from tests.test_user_tasks import write_ratings

_HALF = torch.tensor(0.5)
#: Methods of each kind that `make check` checks.
QUICK = ("maml", "protonet")
#: The checks that it runs.
_CHEAP = ("gradients_reach_every_parameter", "symmetries_are_declared")


#: Fewer adaptation steps, or smaller networks, for the methods with the most; noise of the method.
FEWER_STEPS: dict[str, tuple[tuple[str, Any], ...]] = {
    "baseline": (("head_steps", 20),),
    "baseline_pp": (("head_steps", 20),),
    "calibration": (("samples", 50), ("iterations", 50)),
    "feat": (("attention_dropout", 0.1), ("dropout", 0.5)),
    "finetune": (("test_inner_steps", 5),),
    "pt_map": (("steps", 5), ("iterations", 20)),
    "tim": (("steps", 20),),
    "snail": (("filters", 16), ("keys", [16, 16, 16]), ("values", [16, 16, 16])),
    "meta_lstm": (("hidden", 5), ("input_bias", -1.0)),
    "imaml": (("inner_steps", 5), ("test_inner_steps", 5), ("cg_steps", 2)),
}


#: On embeddings of an untrained network, TIM's 150 steps amplify rounding without bound.
STABLE = {"tim": ["algo.steps=10"]}
#: More training (steps and learning rate) for the methods that learn how to compare.
_MORE_TRAINING = {"in_context": (300, 0.003), "snail": (300, 0.003)}


@functools.cache
def method(name: str) -> testing.Method:
    return testing.Method(name, FEWER_STEPS.get(name, ()), *_MORE_TRAINING.get(name, ()))


@pytest.mark.parametrize(
    ("name", "check"),
    [
        pytest.param(
            name, check, marks=() if name in QUICK and check in _CHEAP else pytest.mark.slow
        )
        for name in ALGORITHMS
        for check in METHOD_CHECKS
    ],
)
def test_method(name, check):
    METHOD_CHECKS[check](method(name))


@pytest.mark.parametrize("statistics", ["query", "population"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS]
)
def test_strategies_agree_on_images(name, statistics, make_run):
    """Convolutions are batched differently from linear layers."""
    # With the default halvings, the last feature maps have a single position.
    maps = ["backbone.halvings=2"] if statistics == "population" else []
    overrides = [
        f"statistics={statistics}",
        "train.meta_batch=3",
        "episode.train.way=5",
        "backbone.filters=4",
    ]
    run = make_run(f"algo={name}", *overrides, *maps, *STABLE.get(name, []))
    tasks, state = to_float64(run.train.draw(0, 3)), to_float64(run.state)
    strategies = (
        ["vmap", "loop"] if run.train_engine.has_own_loss(tasks) else ["vmap", "loop", "mixed"]
    )
    steps = [
        Engine(run.algorithm, one, 3).at(0.5).step(state, tasks, _HALF.double())
        for one in strategies
    ]
    for other in steps[1:]:
        torch.testing.assert_close(other.gradients, steps[0].gradients, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(other.statistics, steps[0].statistics, rtol=1e-7, atol=1e-9)
    tasks = to_float64(run.test.draw(0, 3))
    predictions = [
        Engine(run.algorithm, s, 2).predictions(state, tasks) for s in ("vmap", "loop", "mixed")
    ]
    for prediction in predictions[1:]:
        torch.testing.assert_close(prediction, predictions[0], rtol=1e-7, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_method_runs_in_every_command(name, cache_dir, tmp_path, monkeypatch):
    # The same drawing for all methods; tests/test_cli.py checks it.
    monkeypatch.setattr("metalearn.run.train.draw_learning_curve", lambda *_: None)
    overrides = [
        f"algo={name}",
        "dataset=gaussians",
        "backbone.hidden=[8]",
        "train.batch_size=16",
        "train.steps=2",
    ]
    if name == "simclr":  # its usual views are of images
        overrides += ["augment=none", "+augment.ops.gaussian_noise={}"]
    small = [
        "val.episodes=4",
        "test.episodes=6",
        "logger=none",
        "train.meta_batch=2",
        "episode.query=3",
    ]
    composed = composition.compose_config([*overrides, *small, f"cache_dir={cache_dir}"])
    console = Console(file=io.StringIO(), width=200)
    train(composed, tmp_path / "run", f"{name} gaussians", overrides, console)
    evaluate(tmp_path / "run", [], "test", None, console)
    own = json.loads((tmp_path / "run/result.json").read_text())
    again = json.loads((tmp_path / f"run/evaluations/{own['protocol_id']}.json").read_text())
    assert again["test"] == own["test"]
    model = load(tmp_path / "run")
    x = torch.randn(10, *model.spec.input_shape)
    labels = model.adapt(x, [f"class {number % 5}" for number in range(10)]).predict(x)
    assert set(labels) <= set(model.classes) == {f"class {number}" for number in range(5)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_recipes_for_values_start_without_divergence_or_are_refused(name):
    words = [f"algo={name}", "dataset=sinusoid", "logger=none", "device=cpu"]
    composed = composition.compose_config(words)
    settings = checking.check_config(composed)
    if "value" not in components.component(composed.algo, "algo").targets:
        with pytest.raises(UserError, match="regression"):
            build(settings)
        return
    run = build(settings)
    count = 1 if run.config.train.source == "batches" else 25
    losses = run.train_engine.step(run.state, run.train.draw(0, count), torch.zeros(())).losses
    assert losses.mean() < 1e4  # values are at most 5


#: Small settings for each dataset that needs no files.
_DATASETS = {
    "glyphs": ["dataset.num_classes=60", "dataset.image_size=16"],
    "sinusoid": [],
    "navigation": [],
    "gaussians": [],
    "text": ["dataset.path=toy.csv"],
    "mix": ["dataset.parts=[glyphs,gaussians]", "+dataset.settings={num_classes: 60}"],
    "features": ["dataset.path=toy.npz"],
    "user_values": ["dataset.path=users.csv", "dataset.features=[year,price]"],
    "user_classes": ["dataset.path=users.csv"],
}


@functools.cache
def dataset(name: str, cache_dir: Path) -> testing.DatasetCase:
    settings = checking.check_config(
        composition.compose_config([f"dataset={name}", *_DATASETS[name]])
    ).dataset
    way = {"sinusoid": 1, "navigation": 1, "user_values": 1, "user_classes": 2}.get(name, 5)
    shape = Shape(1, 3, 5) if way == 1 else Shape(way, 2, 3)
    if name.startswith("user"):
        write_ratings(cache_dir / "users.csv")
    if name == "text":
        lines = [f"text {row},label{row % 30}" for row in range(600)]
        (cache_dir / "toy.csv").write_text("\n".join(lines))
    if name == "mix":  # of the same data twice, with other names
        glyphs = {**settings["sets"]["glyphs"], "image_size": 16}
        sets = {"first": glyphs, "second": {**glyphs, "glyph_seed": 1}}
        settings = {**settings, "parts": list(sets), "sets": sets}
    if name == "features":
        x, labels = np.random.default_rng(0).normal(size=(600, 4)), np.arange(600) % 30
        np.savez(cache_dir / "toy.npz", features=x, labels=labels)
    tokenizer = HashedTokens(1000, 8, str.split)
    made = components.make(settings, "dataset", tokenizer=tokenizer)
    return testing.DatasetCase(made, cache_dir, cache_dir, shape)


@pytest.mark.parametrize("check", DATASET_CHECKS)
@pytest.mark.parametrize("name", _DATASETS)
def test_dataset(name, check, cache_dir):
    DATASET_CHECKS[check](dataset(name, cache_dir))


#: Small settings for each backbone, and its inputs.
_BACKBONES = {
    "conv4": (["backbone.filters=3"], InputSpec((2, 16, 16))),
    "mlp": (["backbone.hidden=[5,4]"], InputSpec((7,))),
    "mlp_sinusoid": ([], InputSpec((1,))),
    "mlp_policy": ([], InputSpec((2,))),
    "r2d2_conv": (["backbone.filters=[2,3,4]", "backbone.dropout=0"], InputSpec((1, 12, 12))),
    "resnet12": (["backbone.filters=[2,3,4]", "backbone.dropout=0"], InputSpec((1, 12, 12))),
    "resnet18": ([], InputSpec((3, 32, 32))),
    "timm": (
        ["backbone.model=test_resnet", "backbone.weights=null", "backbone.image_size=32"],
        InputSpec((3, 32, 32)),
    ),
    "torchvision": (
        ["backbone.model=shufflenet_v2_x0_5", "backbone.weights=null", "backbone.image_size=32"],
        InputSpec((1, 32, 32)),
    ),
    "bag_of_ngrams": (["backbone.features=9", "backbone.frozen=false"], InputSpec((6,), 10)),
    "text_transformer": (["backbone.width=8", "backbone.dropout=0"], InputSpec((6,), 10)),
    "efficientnet_lite0": (
        ["backbone.weights=null", "backbone.image_size=32"],
        InputSpec((3, 32, 32)),
    ),
}


@pytest.mark.parametrize("check", BACKBONE_CHECKS)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in ("conv4", "mlp") else pytest.mark.slow) for n in _BACKBONES],
)
def test_backbone(name, check):
    overrides, inputs = _BACKBONES[name]
    settings = checking.check_config(
        composition.compose_config([f"backbone={name}", *overrides])
    ).backbone
    BACKBONE_CHECKS[check](testing.BackboneCase(components.make(settings, "backbone"), inputs))


def test_every_backbone_is_checked():
    apart = ["text_encoder"]  # tests/test_text.py
    assert sorted([*_BACKBONES, *apart]) == sorted(choices.options("backbone"))


@pytest.mark.parametrize("is_declared", [True, False])
def test_wrong_declaration_of_transduction_fails(is_declared):
    from metalearn.algorithms.protonet import ProtoNet

    class Peeking(ProtoNet):
        is_transductive = is_declared

        def compare(self, weights, learned, z):
            return super().compare(weights, learned, z if is_declared else z - z.mean(0))

    settings = (("distance", "squared_euclidean"), ("temperature", 1.0))
    with pytest.raises(AssertionError, match="wrong about depending on other queries"):
        METHOD_CHECKS["transduction_is_declared"](testing.Method(Peeking, settings))
