"""Checkpoint files are intact or refused, and code in them never runs."""

import os

import pytest
import torch

from metalearn.report.folder import RunFolder
from metalearn.run import checkpoint


class Malice:
    """A pickle that runs code when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_code_in_a_checkpoint_is_refused_and_never_runs(tmp_path):
    for content in ({"meta": Malice(tmp_path / "ran"), "fixed": {}}, Malice(tmp_path / "ran")):
        torch.save(content, tmp_path / "last.pt")
        with pytest.raises(checkpoint.CorruptCheckpoint, match="not a readable checkpoint"):
            checkpoint.load(tmp_path / "last.pt", torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


def test_out_of_memory_is_not_treated_as_damage(tmp_path, monkeypatch):
    files = RunFolder(tmp_path)
    for path in (files.last, files.previous):
        checkpoint.save(path, {"meta": {}, "fixed": {}})

    def load(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(RuntimeError, match="allocate"):
        checkpoint.latest(files, lambda line: None)
    assert sorted(path.name for path in files.last.parent.iterdir()) == ["last.pt", "previous.pt"]


def test_damaged_checkpoint_is_renamed_and_the_previous_one_loaded(tmp_path):
    files = RunFolder(tmp_path)
    checkpoint.save(files.previous, {"meta": {}, "fixed": {}, "step": 3})
    files.last.write_bytes(b"")
    latest = checkpoint.latest(files, lambda line: None)
    assert latest is not None and latest["step"] == 3
    assert sorted(path.name for path in files.last.parent.iterdir()) == [
        "damaged-last.pt",
        "previous.pt",
    ]


@pytest.mark.slow
def test_every_damaged_byte_is_detected_or_harmless(tmp_path):
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"meta": {"w": torch.arange(5.0)}, "fixed": {}, "best": {"step": 3}})
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 64]) + content[position + 1 :]
        )
        try:
            loaded = checkpoint.load(path, torch.device("cpu"))
        except checkpoint.CorruptCheckpoint:
            continue
        assert torch.equal(loaded["meta"]["w"], torch.arange(5.0)) and loaded["best"] == {"step": 3}
