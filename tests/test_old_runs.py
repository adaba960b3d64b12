"""Run folders of commit 968c425, before episodes, settings and classes moved, still work."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

import metalearn
from metalearn.cli.compare import compare
from metalearn.config import composition
from metalearn.run import train
from metalearn.run.evaluate import evaluate
from metalearn.system.errors import UserError

_STORED = Path(__file__).parent / "data/old_runs"
_NAMES = ("protonet", "reptile")


@pytest.fixture
def old(tmp_path):
    """Copy an old run folder."""

    def copy(name):
        shutil.copytree(_STORED / name, tmp_path / name)
        return tmp_path / name

    return copy


@pytest.mark.parametrize("name", _NAMES)
def test_predictions_equal_those_of_the_old_version(name):
    expected = torch.load(_STORED / name / "expected.pt", weights_only=True)
    for statistics, probabilities in expected["probabilities"].items():
        model = metalearn.load(_STORED / name, statistics)
        learner = model.adapt(expected["x"][:10], expected["y"])
        new = learner.probabilities(expected["x"][10:])
        torch.testing.assert_close(new, probabilities, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", _NAMES)
def test_evaluate_uses_the_current_sampler(name, old, cache_dir):
    folder, console = old(name), Console(width=160, record=True)
    evaluate(folder, [f"cache_dir={cache_dir}", "episode.shot=2"], "test", None, console)
    evaluate(folder, [f"cache_dir={cache_dir}"], "test", None, console)
    result = json.loads((folder / "result.json").read_text())
    evaluations = [json.loads(path.read_text()) for path in (folder / "evaluations").glob("*.json")]
    assert result["protocol_id"] not in {one["protocol_id"] for one in evaluations}
    assert {one["protocol"]["sampler"] for one in evaluations} == {2}
    keys = ("statistics", "shot")
    same = [
        one for one in evaluations if all(one["protocol"][k] == result["protocol"][k] for k in keys)
    ]
    # The tolerance is large because the episodes are few and differ.
    assert abs(same[0]["test"]["accuracy"]["mean"] - result["test"]["accuracy"]["mean"]) < 0.25


@pytest.mark.slow
@pytest.mark.slow
def test_compare_reports_different_samplers(old, cache_dir, tmp_path):
    folder, console = old("protonet"), Console(width=160, record=True)
    compare([folder], tmp_path / "alone", console)
    assert "different versions of the sampler" not in console.export_text()
    evaluate(folder, [f"cache_dir={cache_dir}"], "test", None, console)
    compare([folder], tmp_path / "both", console)
    assert "different versions of the sampler" in (tmp_path / "both/comparison.md").read_text()


def test_unfinished_old_run_is_refused_with_one_line(old, cache_dir):
    folder = old("protonet")
    (folder / "result.json").unlink()
    (folder / "checkpoints/best.pt").rename(folder / "checkpoints/last.pt")
    settings = folder / "config.yaml"
    settings.write_text(settings.read_text().replace("cache_dir: null", f"cache_dir: {cache_dir}"))
    with pytest.raises(
        UserError, match="was made by another version of metalearn and cannot be resumed"
    ):
        train.resume(folder, Console(quiet=True))


def test_newer_settings_default_to_the_old_behaviour():
    stored = composition.load_config(_STORED / "reptile")
    assert stored.optimiser._target_ == "torch.optim.SGD"
    assert (stored.train.optimiser, stored.loss.name, dict(stored.augment.ops)) == (None, None, {})
    assert (stored.episode.unlabelled, stored.episode.train.distractors) == (0, 0)
    assert stored.dataset.rotations_share_drawings is True
