"""`metalearn export`: each method gives the same probabilities in onnxruntime, or a reason."""

import base64
import io
import json
import sys

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

import metalearn
from metalearn import FewShotClassifier
from metalearn.cli._completion import candidates
from metalearn.cli.main import _command, commands, main
from metalearn.config import composition
from metalearn.config.checking import check_config
from metalearn.predict import heads
from metalearn.predict.export import TOLERANCE
from metalearn.report.progress import SILENT
from metalearn.run import loop
from metalearn.run.build import build
from metalearn.run.load import Model
from tests.fixtures import ALGORITHMS

onnxruntime = pytest.importorskip("onnxruntime")

#: Smaller graphs of the methods with the most iterations.
_FEWER = {
    "calibration": ["algo.iterations=5", "algo.samples=5"],
    "metaopt_svm": ["algo.iterations=3"],
    "rfs": ["algo.iterations=10"],
}
#: Methods with linear algebra that ONNX has no operator for, and what they say.
_NO_GRAPH = {
    "calibration": "linalg_cholesky_ex",
    "frn": "only one linear system at a time",
    "metaopt_svm": "only one linear system at a time",
    "snail": "it reads the support examples one after the other",
}
#: What the first use of a dataset prints.
_PREPARING = "preparing the images of glyphs (only the first time)\n"
#: Overrides that make a run on sinusoids small.
_FEW = ["train.steps=2", "val.episodes=4", "test.episodes=4", "logger=none"]


@pytest.fixture
def run_folder(compose, tmp_path):
    """Train a short run; return its folder and the run."""

    def train(*overrides):
        is_image = "dataset=sinusoid" not in overrides
        config = (
            compose(*overrides) if is_image else composition.compose_config([*overrides, *_FEW])
        )
        folder = tmp_path / "run"
        folder.mkdir()
        run = build(check_config(config))
        loop.fit(run, SILENT, folder)
        OmegaConf.save(config, folder / "config.yaml", resolve=True)
        return folder, run

    return train


@pytest.fixture
def export(monkeypatch, capfd, tmp_path):
    """Run `metalearn export` in this process; return its exit code, output and errors."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["metalearn", "export", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capfd.readouterr()
        return stopped.value.code, out, err.removeprefix(_PREPARING)

    return run


def probabilities(file, **inputs):
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    arrays = {name: np.asarray(x, np.float32) for name, x in inputs.items()}
    return session.run(["probabilities"], arrays)[0]


def check_run(folder, run, file):
    """The graph equals metalearn.load on images of test classes, for several ways and shots."""
    spread = 0.0
    for some_way, shot, queries in ((2, 1, 5), (4, 3, 1), (7, 2, 30)):
        way = run.spec.way if run.algorithm.fixed_way else some_way
        rows = run.test.view.index.rows[:way]
        store = run.test.store.load(rows[:, : shot + 5].flatten()).unflatten(0, (way, -1))
        x, y = store[:, :shot].flatten(0, 1), torch.arange(way).repeat_interleave(shot)
        q = store[:, shot:].flatten(0, 1)[:queries]
        own = metalearn.load(folder, device="cpu").adapt(x, y).probabilities(q).numpy()
        labels = torch.eye(way)[y]
        found = probabilities(file, support_images=x, support_labels=labels, query_images=q)
        np.testing.assert_allclose(found, own, rtol=0, atol=TOLERANCE)
        spread = max(spread, float(np.ptp(own)))
    assert spread > 100 * TOLERANCE  # so it is no comparison of constants


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"), [*((name, _FEWER.get(name, [])) for name in ALGORITHMS),
                       ("in_context", ["algo.codes=8"])],
)  # fmt: skip
def test_every_method_is_exported_or_says_why_not(name, more, run_folder, export, tmp_path):
    folder, run = run_folder(f"algo={name}", *more)
    file = tmp_path / "new" / "method.onnx"
    code, out, err = export(f"run={folder}", f"out={file}")
    if run.algorithm.takes_gradients or run.algorithm.is_transductive:
        reasons = ("it learns by gradients", "its predictions depend on the other queries")
        assert code == 2 and not file.exists()
        assert err.count("\n") == 1 and any(f"cannot be exported: {r}" in err for r in reasons)
    elif name in _NO_GRAPH:
        assert code == 2 and not file.exists()
        assert err.count("\n") == 1 and _NO_GRAPH[name] in err
    else:
        assert code == 0, err
        assert out.count(" query images") == 3 and str(file) in out
        check_run(folder, run, file)


@pytest.mark.parametrize("name", ["calibration", "frn", "metaopt_svm"])
def test_linear_algebra_without_a_translation_is_refused_before_the_long_trace(
    name, run_folder, export, tmp_path, monkeypatch
):
    folder, _ = run_folder(f"algo={name}")
    monkeypatch.setattr(torch.onnx, "export", None)
    code, _, err = export(f"run={folder}", f"out={tmp_path}/method.onnx")
    assert code == 2 and err.count("\n") == 1 and _NO_GRAPH[name] in err


@pytest.mark.slow
def test_what_can_be_exported_does_not_depend_on_the_statistics_of_training(
    run_folder, export, tmp_path
):
    """A run with query statistics predicts with the support set's, as metalearn.load does."""
    folder, run = run_folder("algo=protonet", "statistics=query")
    assert export(f"run={folder}", f"out={tmp_path}/method.onnx")[0] == 0
    check_run(folder, run, tmp_path / "method.onnx")


@pytest.mark.parametrize(
    ("overrides", "is_transductive", "reason"),
    [
        (["algo=anil"], False, "it learns by gradients of the support set's loss"),
        (["algo=protonet"], True, "its predictions depend on the other queries"),
        (["algo=matching", "algo.full_context=true"], False, "one after the other"),
    ],
)
def test_reasons_follow_from_declared_capabilities(
    overrides, is_transductive, reason, run_folder, export, tmp_path, monkeypatch
):
    folder, run = run_folder(*overrides)
    if is_transductive:
        monkeypatch.setattr(type(run.algorithm), "is_transductive", True)
    code, out, err = export(f"run={folder}", f"out={tmp_path}/method.onnx")
    assert (code, out) == (2, "") and reason in err and err.count("\n") == 1


def test_regression_says_why_not(run_folder, export, tmp_path):
    folder, _ = run_folder("algo=maml", "dataset=sinusoid")
    code, _, err = export(f"run={folder}", f"out={tmp_path}/method.onnx")
    assert code == 2 and "it does not classify images" in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_wrong_graph_is_a_failure(run_folder, export, tmp_path, monkeypatch):
    folder, _ = run_folder("algo=protonet")
    own = Model.task_probabilities
    monkeypatch.setattr(Model, "task_probabilities", lambda self, *x: own(self, *x).flip(-1))
    code, out, err = export(f"run={folder}", f"out={tmp_path}/method.onnx")
    assert (code, out) == (1, "") and "probabilities differ" in err and err.count("\n") == 1


def drawn(number, seed):
    """Return images of three classes of stripes, in sizes that vary."""
    rng = np.random.default_rng(seed)
    images = []
    for index in range(number):
        height, width = rng.integers(30, 90, 2)
        waves = np.sin(np.arange(width) / (1 + 2 * (index % 3)))[None, :, None]
        noise = rng.normal(size=(height, width, 3))
        images.append(Image.fromarray((127 + 60 * waves + 20 * noise).clip(0, 255).astype("u1")))
    return images, np.array(["b", "c", "a"])[np.arange(number) % 3]


def check_classifier(classifier, file, pixels, images):
    own = classifier.predict_proba(images)
    assert np.ptp(own) > 100 * TOLERANCE
    np.testing.assert_allclose(probabilities(file, images=pixels), own, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("head", heads.HEADS)
def test_pretrained_classifier_needs_only_its_metadata(head, export, tmp_path, monkeypatch):
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "cache"))
    backbone = "timm backbone.model=test_resnet backbone.weights=null backbone.image_size=32"
    images, y = drawn(9, 0)
    classifier = FewShotClassifier(backbone, head, normalise="standard").fit(images, y)
    classifier.save(tmp_path / "c")
    code, out, err = export(f"classifier={tmp_path}/c", f"out={tmp_path}/c.onnx")
    assert code == 0 and "8 random images" in out, err
    facts = onnxruntime.InferenceSession(tmp_path / "c.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == ["a", "b", "c"] and int(facts["opset"]) >= 18
    resize = Resize(int(facts["resize"]), InterpolationMode(facts["interpolation"]))
    crop = CenterCrop(int(facts["size"]))
    others = drawn(7, 1)[0]
    pixels = [np.asarray(crop(resize(one))).transpose(2, 0, 1) / 255 for one in others]
    check_classifier(classifier, tmp_path / "c.onnx", np.stack(pixels), others)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "head"),
    [
        (["algo=maml", "algo.inner_lr=0.3", "algo.test_inner_steps=20"], "auto"),
        (["algo=protonet"], "ridge"),
    ],
)
def test_classifier_on_a_run(overrides, head, run_folder, export, tmp_path):
    """Also of a method that learns by gradients: the adapted weights are in the graph."""
    folder, _ = run_folder(*overrides, "episode.way=3", "episode.train.way=3")
    images, y = drawn(9, 0)
    buffer = io.BytesIO()
    images[0].convert("RGB").resize((40, 40)).save(buffer, "JPEG")
    notes = [{"thumbnail": base64.b64encode(buffer.getvalue()).decode()}] * 9
    classifier = FewShotClassifier(run=folder, head=head).fit(images, y, notes)
    classifier.save(tmp_path / "c")
    code, out, err = export(f"classifier={tmp_path}/c", f"out={tmp_path}/c.onnx")
    assert code == 0 and "9 of its examples" in out, err
    others = drawn(7, 1)[0]
    pixels = np.stack([classifier.network._model.read_image(one) for one in others]) / 255
    check_classifier(classifier, tmp_path / "c.onnx", pixels, others)


def test_mistakes_are_one_line(export, tmp_path, monkeypatch):
    FewShotClassifier().fit(np.eye(6), list("aabbcc")).save(tmp_path / "vectors")
    for words, text in (
        ([], "takes classifier=<folder> or run=<folder>"),
        (["run=a", "classifier=b"], "takes classifier=<folder> or run=<folder>"),
        (["run=a", "format=tflite"], "format=tflite: should be onnx"),
        (["run=a", "forma=onnx"], "did you mean format"),
        (["run=nowhere"], "nowhere"),
        ([f"classifier={tmp_path}/vectors"], "learns from feature vectors"),
    ):
        code, out, err = export(*words)
        assert (code, out) == (2, "") and text in err and err.count("\n") == 1


def test_missing_package_is_named(run_folder, export, tmp_path, monkeypatch):
    folder, _ = run_folder("algo=protonet")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, err = export(f"run={folder}", f"out={tmp_path}/method.onnx")
    assert code == 2 and "pip install 'metalearn-lab[export]'" in err and "onnxruntime" in err


def test_completion():
    takes = {name: _command(name).TAKES for name in commands()}
    assert candidates("metalearn export format=", takes) == ["format=onnx ", "format=safetensors "]
    assert "classifier=" in candidates("metalearn export ", takes)
