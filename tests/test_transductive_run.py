"""A run of a transductive method: whole tasks are predicted, single images are not."""

import re

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console

import metalearn
from metalearn import FewShotClassifier
from metalearn.config.checking import check_config
from metalearn.report.progress import SILENT
from metalearn.run import loop
from metalearn.run.build import build
from metalearn.run.evaluate import evaluate
from metalearn.run.train import train
from metalearn.system.errors import UserError


@pytest.fixture
def folder(compose, tmp_path):
    config = compose("algo=bd_cspn", "train.batch_size=8")
    loop.fit(build(check_config(config)), SILENT, tmp_path)
    OmegaConf.save(config, tmp_path / "config.yaml", resolve=True)
    return tmp_path


def test_a_classifier_requires_a_head(folder):
    images = torch.rand(6, 1, 16, 16)
    model = metalearn.load(folder).adapt(images[:4], list("abab"))
    assert len(model.predict(images)) == 6
    line = "depend on the other queries, so an image alone has no label; choose a head"
    with pytest.raises(UserError, match=line):
        _ = FewShotClassifier(run=folder).network
    assert FewShotClassifier(run=folder, head="ridge").network is not None


def test_every_report_says_that_a_method_is_transductive_under_any_statistics(compose, tmp_path):
    console = Console(width=200, record=True)
    words = ["algo=bd_cspn", "train.batch_size=8", "train.steps=1", "val.every=1"]
    train(compose(*words), tmp_path / "run", "bd_cspn", words, console)
    evaluate(tmp_path / "run", ["episode.dirichlet=2", "episode.query=1"], "test", None, console)
    text = console.export_text()
    assert len(re.findall(r"5w 1s \d+q .*population, transductive", text)) == 2
    assert re.search(r"5w 1s 1q dirichlet=2 ", text)
    # Both statistics are transductive here, so their difference is no gain of transduction.
    assert "minus inductive" not in text
    assert len(list((tmp_path / "run" / "evaluations").glob("*.json"))) == 1
