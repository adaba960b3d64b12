"""A run of a transductive method: whole tasks are predicted, single images are not."""

import pytest
import torch
from omegaconf import OmegaConf

import metalearn
from metalearn import FewShotClassifier
from metalearn.config.checking import check_config
from metalearn.report.progress import SILENT
from metalearn.run import loop
from metalearn.run.build import build
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
