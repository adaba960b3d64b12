"""Checkpoint files: whole or refused, and nothing in them runs."""

import os

import pytest
import torch

from metalearn.run import checkpoint


class Malice:
    """Code in a pickle."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path):
    for content in ({"meta": Malice(tmp_path / "ran"), "fixed": {}}, Malice(tmp_path / "ran")):
        torch.save(content, tmp_path / "last.pt")
        with pytest.raises(checkpoint.Damaged, match="not a readable checkpoint"):
            checkpoint.load(tmp_path / "last.pt", torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


def test_too_little_memory_is_not_taken_for_damage(tmp_path, monkeypatch):
    for name in ("last.pt", "previous.pt"):
        checkpoint.save(tmp_path / name, {"meta": {}, "fixed": {}})

    def load(*words, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(RuntimeError, match="allocate"):
        checkpoint.latest(tmp_path, lambda line: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


def test_a_damaged_checkpoint_goes_out_of_the_way_of_the_whole_one(tmp_path):
    checkpoint.save(tmp_path / "previous.pt", {"meta": {}, "fixed": {}, "step": 3})
    (tmp_path / "last.pt").write_bytes(b"")
    latest = checkpoint.latest(tmp_path, lambda line: None)
    assert latest is not None and latest["step"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged-last.pt", "previous.pt"]


@pytest.mark.slow
def test_no_damage_to_a_checkpoint_escapes(tmp_path):
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"meta": {"w": torch.arange(5.0)}, "fixed": {}, "best": {"step": 3}})
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :])
        try:
            found = checkpoint.load(path, torch.device("cpu"))
        except checkpoint.Damaged:
            continue
        assert torch.equal(found["meta"]["w"], torch.arange(5.0)) and found["best"] == {"step": 3}
