"""Run folders made by commit 968c425, before episodes, settings and classes moved, still work."""

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
    """A copy of an old run folder."""

    def copied(name):
        shutil.copytree(_STORED / name, tmp_path / name)
        return tmp_path / name

    return copied


@pytest.mark.parametrize("name", _NAMES)
def test_predictions_are_those_of_the_version_that_made_the_run(name):
    expected = torch.load(_STORED / name / "expected.pt", weights_only=True)
    for statistics, probabilities in expected["probabilities"].items():
        model = metalearn.load(_STORED / name, statistics)
        found = model.adapt(expected["x"][:10], expected["y"]).probabilities(expected["x"][10:])
        torch.testing.assert_close(found, probabilities, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", _NAMES)
def test_evaluate_gives_an_old_run_the_episodes_of_this_version(name, old, cache_dir):
    folder, console = old(name), Console(width=160, record=True)
    evaluate(folder, [f"cache_dir={cache_dir}", "episode.unlabelled=1"], "test", None, console)
    evaluate(folder, [f"cache_dir={cache_dir}"], "test", None, console)
    own = json.loads((folder / "result.json").read_text())
    again = [json.loads(path.read_text()) for path in (folder / "evaluations").glob("*.json")]
    assert own["protocol_id"] not in {one["protocol_id"] for one in again}
    assert {one["protocol"]["sampler"] for one in again} == {2}
    same = [one for one in again if one["protocol"]["statistics"] == own["protocol"]["statistics"]]
    assert (
        abs(same[0]["test"]["accuracy"]["mean"] - own["test"]["accuracy"]["mean"]) < 0.25
    )  # other episodes, few


def test_compare_says_that_episodes_are_of_different_samplers(old, cache_dir, tmp_path):
    folder, console = old("protonet"), Console(width=160, record=True)
    compare([folder], tmp_path / "alone", console)
    assert "different versions of the sampler" not in console.export_text()
    evaluate(folder, [f"cache_dir={cache_dir}"], "test", None, console)
    compare([folder], tmp_path / "both", console)
    assert "different versions of the sampler" in (tmp_path / "both/comparison.md").read_text()


def test_an_old_run_that_is_not_finished_is_refused_in_a_line(old, cache_dir):
    folder = old("protonet")
    (folder / "result.json").unlink()
    (folder / "checkpoints/best.pt").rename(folder / "checkpoints/last.pt")
    settings = folder / "config.yaml"
    settings.write_text(settings.read_text().replace("cache_dir: null", f"cache_dir: {cache_dir}"))
    with pytest.raises(
        UserError, match="was made by another version of metalearn and cannot be resumed"
    ):
        train.resume(folder, Console(quiet=True))


def test_settings_that_are_newer_than_the_run_have_the_values_it_had():
    stored = composition.stored(_STORED / "reptile")
    assert stored.optimiser._target_ == "torch.optim.SGD"
    assert (stored.train.optimiser, stored.loss.name, dict(stored.augment.ops)) == (None, None, {})
    assert (stored.episode.unlabelled, stored.episode.train.distractors) == (0, 0)
    assert stored.dataset.rotations_share_drawings is True
