"""`metalearn.load`, and the notebook that shows it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import metalearn
from metalearn.config import composition
from metalearn.config.checking import check_config
from metalearn.report.progress import SILENT
from metalearn.run import checkpoint, loop
from metalearn.run.build import build
from metalearn.system.errors import UserError

_NOTEBOOK = Path(__file__).parent.parent / "docs" / "from_python.ipynb"


@pytest.fixture
def trained(compose, tmp_path):
    """Train a short run; return its folder and the run."""

    def train(*overrides):
        has_images = "dataset=sinusoid" not in overrides
        config = compose(*overrides) if has_images else composition.compose_config(list(overrides))
        run = build(check_config(config))
        loop.fit(run, SILENT, tmp_path)
        OmegaConf.save(config, tmp_path / "config.yaml", resolve=True)
        return tmp_path, run

    return train


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("name", ["maml", "protonet"])
def test_predictions_equal_those_of_the_test(trained, name):
    folder, run = trained(f"algo={name}", "statistics=query")
    model = metalearn.load(folder, statistics="query")
    task = run.test.draw(0, 1)
    expected = run.test_engine.predictions(run.state, task)[0].softmax(-1)
    store = run.test.store

    def bytes_of(x):
        return ((x / store.scale + store.shift) * 255).round().to(torch.uint8)

    # Other labels, in another order.
    letters = np.array(["e", "d", "c", "b", "a"])
    order = task.support.y[0].argsort()
    model.adapt(bytes_of(task.support.x[0][order]), letters[task.support.y[0][order]])
    torch.testing.assert_close(
        model.probabilities(bytes_of(task.query.x[0])), expected, rtol=1e-4, atol=1e-5
    )
    assert model.predict(bytes_of(task.query.x[0])) == letters[expected.argmax(-1)].tolist()
    assert model.classes == letters.tolist()
    assert model.config.algo._target_ == run.config.algo["_target_"]


def test_run_without_a_checkpoint_is_not_finished(compose, tmp_path):
    OmegaConf.save(compose("algo=protonet"), tmp_path / "config.yaml", resolve=True)
    with pytest.raises(UserError, match=f"{tmp_path}: not finished; .*metalearn resume {tmp_path}"):
        metalearn.load(tmp_path)


def test_missing_weight_of_another_version_is_named(trained):
    folder, _ = trained("algo=relation")
    path = folder / "checkpoints/best.pt"
    content = checkpoint.load(path, torch.device("cpu"))
    del content["meta"]["relation.conv0.weight"]
    checkpoint.save(path, content)
    with pytest.raises(UserError, match=r"its checkpoint has no relation\.conv0\.weight; another"):
        metalearn.load(folder)


@pytest.mark.slow
@pytest.mark.slow
def test_default_predictions_do_not_depend_on_each_other(trained):
    folder, run = trained("algo=maml")
    task = run.test.draw(0, 1)
    model = metalearn.load(folder).adapt(task.support.x[0], task.support.y[0])
    probabilities = model.probabilities(task.query.x[0])
    alone = model.probabilities(task.query.x[0][:1])
    torch.testing.assert_close(probabilities[:1], alone)
    with pytest.raises(UserError, match="has no population statistics"):
        metalearn.load(folder, statistics="population")


def test_adapts_from_the_same_state_each_time(trained):
    folder, run = trained("algo=maml", "train.steps=1")
    first, second = (run.test.draw(number, 1) for number in (0, 1))
    model = metalearn.load(folder)
    before = model.adapt(first.support.x[0], first.support.y[0]).probabilities(first.query.x[0])
    model.adapt(second.support.x[0], second.support.y[0])
    again = model.adapt(first.support.x[0], first.support.y[0]).probabilities(first.query.x[0])
    assert torch.equal(before, again)


@pytest.mark.slow
def test_image_files_are_read_as_the_dataset_reads_its_own(trained, tmp_path):
    folder, _ = trained("algo=protonet", "dataset.image_size=16")
    paper = np.full((64, 64), 255, np.uint8)
    paper[:, 20:30] = 0
    Image.fromarray(paper).save(tmp_path / "ink.png")
    x = metalearn.load(folder).inputs([tmp_path / "ink.png"])
    assert x.shape == (1, 1, 16, 16)
    assert x[0, 0, 8, 6] > 0.9 > 0.1 > x[0, 0, 8, 14].abs()
    # Black ink on a transparent background, as drawing programs save it.
    clear = np.stack([paper * 0, paper * 0, paper * 0, 255 - paper], -1)
    Image.fromarray(clear, "RGBA").save(tmp_path / "clear.png")
    torch.testing.assert_close(metalearn.load(folder).inputs(tmp_path / "clear.png"), x)
    assert metalearn.load(folder).inputs(tmp_path.glob("*.png")).shape == (2, 1, 16, 16)


def test_regression_predicts_values(trained):
    folder, _ = trained("dataset=sinusoid", "train.steps=2", "val.episodes=4")
    model = metalearn.load(folder)
    x = torch.linspace(-5, 5, 10)[:, None]
    assert model.adapt(x, x.sin()).predict(x).shape == (10, 1)
    with pytest.raises(UserError, match=r"y has shape \(10,\); this run requires \[M, 1\]"):
        model.adapt(x, x.sin()[:, 0])
    with pytest.raises(UserError, match="for classes"):
        model.probabilities(x)


@pytest.mark.slow
def test_mistakes_are_explained(trained, tmp_path):
    folder, run = trained("algo=maml", "train.steps=1")
    model = metalearn.load(folder)
    task = run.test.draw(0, 1)
    x, y = task.support.x[0], task.support.y[0]
    with pytest.raises(UserError, match="call adapt"):
        model.predict(x)
    with pytest.raises(UserError, match="3 classes in the examples; this run distinguishes 5"):
        model.adapt(x[:3], [0, 1, 2])
    with pytest.raises(UserError, match="5 examples and y 6"):
        model.adapt(x, [0, 1, 2, 3, 4, 0])
    with pytest.raises(UserError, match=r"shape \(5, 16, 16\); this run requires \[M, 1, 16, 16\]"):
        model.adapt(x[:, 0], y)
    for wrong, line in [
        (x.double().numpy() * 255, "outside"),
        ((x * 255).long(), "outside"),
        (x / 0, "not finite"),
        ("nowhere.png", "nowhere.png is not a readable image"),
        ([object()], "neither an array of numbers"),
    ]:
        with pytest.raises(UserError, match=line):
            model.inputs(wrong)
    with pytest.raises(UserError, match="one label for each example"):
        model.adapt(x, torch.eye(5))
    with pytest.raises(UserError, match="steps=-1"):
        model.adapt(x, y, steps=-1)
    with pytest.raises(UserError, match="device=gpu: should be one of"):
        metalearn.load(folder, device="gpu")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"broken\.png is not a readable image"):
        model.inputs([tmp_path / "broken.png"])
    with pytest.raises(UserError, match="nowhere: no run there"):
        metalearn.load(tmp_path / "nowhere")


@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch, cache_dir, capsys, request):
    metalearn_command = request.getfixturevalue("metalearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METALEARN_CACHE", str(cache_dir))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    names: dict = {}

    def short_training(command, check):
        """Run the command of the training cell with fewer classes and steps."""
        assert command[:3] == [sys.executable, "-m", "metalearn"] and check
        small = ["dataset.num_classes=200", "train.steps=60", "val.every=60"]
        assert metalearn_command(*command[3:], *small, cwd=tmp_path).returncode == 0

    monkeypatch.setattr(subprocess, "run", short_training)
    for cell in json.loads(_NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["accuracy"] > 0.5
    assert "images classified correctly" in capsys.readouterr().out
