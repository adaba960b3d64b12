"""`train.start`: a run starts from the weights of another run."""

import pytest
import torch

from metalearn.report.progress import SILENT
from metalearn.run import checkpoint, loop
from metalearn.system.errors import UserError

_BATCHES = ["algo=meta_baseline", "train.source=batches", "train.batch_size=8"]


@pytest.fixture
def first(make_run, tmp_path):
    """Train on batches; return the folder of the run and its best weights."""
    run = make_run(*_BATCHES)
    loop.fit(run, SILENT, tmp_path)
    return tmp_path, checkpoint.load(tmp_path / "checkpoints/best.pt", run.device)


def test_meta_baseline_continues_on_episodes_with_the_weights_of_its_first_stage(first, make_run):
    folder, stored = first
    plain = make_run("algo=meta_baseline")
    run = make_run("algo=meta_baseline", f"train.start={folder}")
    assert run.state.params.keys() == plain.state.params.keys()  # without the classifier
    for name, value in run.state.params.items():
        torch.testing.assert_close(value, stored["meta"][name], rtol=0, atol=0)
    assert any(not torch.equal(run.state.params[n], x) for n, x in plain.state.params.items())
    for name, value in run.state.buffers.items():
        torch.testing.assert_close(value, stored["fixed"][name], rtol=0, atol=0)


def test_start_keeps_the_new_head_and_requires_the_same_backbone(first, make_run):
    folder, stored = first
    run = make_run("algo=feat", f"train.start={folder}")
    assert "head.query" in run.state.params and "head.query" not in stored["meta"]
    with pytest.raises(UserError, match=r"train\.start=.* choose a run with the same backbone"):
        make_run("algo=feat", f"train.start={folder}", "backbone.filters=9")
    with pytest.raises(UserError, match=r"best\.pt"):
        make_run("algo=feat", f"train.start={folder}/nothing")
