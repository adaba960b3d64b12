"""Models: a finished run as safetensors with a card, and those of models/."""

import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

import metalearn
from metalearn.cli import export
from metalearn.cli import list as list_command
from metalearn.config import checking, composition
from metalearn.report.folder import RunFolder
from metalearn.report.measurements import measurements_of
from metalearn.run import checkpoint, parts
from metalearn.run.ensemble import evaluate_ensemble
from metalearn.run.evaluate import evaluate
from metalearn.run.train import train
from metalearn.system.errors import UserError

_MODELS = sorted((Path(__file__).parent.parent / "models").glob("*/"))


@pytest.fixture
def exported(compose, tmp_path, monkeypatch):
    """Train a short run and export it to models/; return the folders of both."""
    monkeypatch.chdir(tmp_path)
    run, console = tmp_path / "run", Console()
    train(compose("algo=protonet"), run, "protonet glyphs", [f"data_dir={tmp_path}"], console)
    assert export.main([f"run={run}", "format=safetensors"]) == 0
    return run, Path("models/protonet-glyphs")


def test_model_predicts_and_tests_like_its_run(exported, cache_dir):
    run, model = exported
    images, labels = torch.rand(6, 1, 16, 16), ["a", "a", "b", "b", "c", "c"]
    expected, here = (metalearn.load(folder).adapt(images, labels) for folder in (run, model))
    torch.testing.assert_close(here.probabilities(images), expected.probabilities(images))
    evaluate(model, [f"cache_dir={cache_dir}"], "test", None, Console())
    tests = [json.loads(path.read_text()) for path in (model / "evaluations").glob("*.json")]
    own = json.loads((run / "result.json").read_text())
    same = next(one for one in tests if one["protocol_id"] == own["protocol_id"])
    assert same["test"]["accuracy"]["mean"] == pytest.approx(own["test"]["accuracy"]["mean"])


def test_model_names_no_folder_and_is_listed(exported, tmp_path, capsys):
    run, model = exported
    text = "".join((model / name).read_text() for name in ("README.md", "config.yaml"))
    text += (model / "result.json").read_text()
    assert str(tmp_path) not in text and "`dataset=glyphs`" in text
    capsys.readouterr()
    assert list_command.main([]) == 0
    line = r"\n  models/protonet-glyphs +protonet on glyphs: accuracy"
    assert re.search(line, capsys.readouterr().out)
    with pytest.raises(UserError, match="out=models/protonet-glyphs exists"):
        export.main([f"run={run}", "format=safetensors"])
    with pytest.raises(UserError, match="no run there"):
        export.main([f"run={tmp_path}", "format=safetensors"])


def test_a_model_is_compared_once_it_is_tested(exported, cache_dir):
    _, model = exported
    with pytest.raises(UserError, match="has no scores of episodes; to test it: metalearn eval"):
        list(measurements_of(model))
    evaluate(model, [f"cache_dir={cache_dir}"], "test", None, Console())
    ids = [one.result.protocol_id for one in measurements_of(model)]
    assert RunFolder(model).read_result().protocol_id in ids
    assert ids == [path.stem for path in sorted((model / "evaluations").glob("*.json"))]


def test_a_folder_without_a_finished_run_is_named_by_each_command(tmp_path):
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / "config.yaml").touch()
    for name, message in (
        ("nothing", "no run there; name the folder of a finished run"),
        ("started", "not finished; to finish it: metalearn resume"),
    ):
        run = tmp_path / name
        for command, words in (
            (metalearn.load, (run,)),  # predict and serve, too
            (evaluate, (run, [], "test", None, Console())),
            (evaluate_ensemble, ([run], [], "test", Console())),
            (export.main, ([f"run={run}", "format=safetensors"],)),
            (export.main, ([f"run={run}"],)),
        ):
            with pytest.raises(UserError, match=message):
                command(*words)


def test_data_of_a_model_are_where_the_environment_says(exported, monkeypatch, tmp_path):
    stored = composition.load_config(exported[1])
    assert stored.data_dir is stored.cache_dir is None
    monkeypatch.setenv("METALEARN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "cache"))
    settings = checking.check_config(stored)
    folders = parts.data_folder(settings), parts.cache_folder(settings)
    assert folders == (tmp_path / "data", tmp_path / "cache")


def test_changed_weights_are_noticed(exported):
    file = RunFolder(exported[1]).best
    content = bytearray(file.read_bytes())
    content[-1] ^= 64
    file.write_bytes(content)
    with pytest.raises(checkpoint.CorruptCheckpoint, match="does not match its checksum"):
        checkpoint.load(file, torch.device("cpu"))


@pytest.mark.parametrize("folder", _MODELS, ids=lambda folder: folder.name)
def test_committed_models_are_small_and_complete(folder):
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    assert size <= 2 << 20
    model, result = metalearn.load(folder), RunFolder(folder).read_result()
    assert model.embeds_alone or model.way == result.protocol["way"]
    card = (folder / "README.md").read_text()
    line = card.partition("\n")[0]
    assert f"{100 * result.test.mean:.2f}%" in line and result.training["command"] in card
    for part in ("method", "data", "protocol", "result", "command", "made with", "licence"):
        assert f"| {part} |" in card
    settings = (folder / "config.yaml").read_text()
    assert not re.search(r"""(^|[\s'"=(])/\w""", card + settings)  # no absolute path


def test_there_are_models_of_the_demo_omniglot_and_cifar_fs():
    names = {RunFolder(folder).read_result().name for folder in _MODELS}
    assert {"maml glyphs", "protonet omniglot", "protonet cifar_fs", "rfs cifar_fs"} <= names
    total = sum(path.stat().st_size for folder in _MODELS for path in folder.iterdir())
    assert total <= 12 << 20
