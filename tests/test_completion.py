"""Shell completion."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from metalearn.cli import main
from metalearn.cli._completion import candidates


def completed(line):
    return candidates(line, {name: main._command(name).TAKES for name in main.commands()})


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("metalearn ev", ["evaluate "]),
        ("metalearn train algo=proto", ["algo=proto_maml ", "algo=protonet "]),
        ("metalearn train algo=maml algo.inner_s", ["algo.inner_steps="]),
        ("metalearn train engine.cuda_g", ["engine.cuda_graph="]),
        ("metalearn train engine.cuda_graph=t", ["engine.cuda_graph=true "]),
        ("metalearn train experiment=dem", ["experiment=demo "]),
        ("metalearn train hydra.run", ["hydra.run.dir="]),
        ("metalearn evaluate spl", ["split="]),
        ("metalearn evaluate run=x split=te", ["split=test "]),
        ("metalearn reproduce maml_omniglot_5w1", ["maml_omniglot_5w1s "]),
        ("metalearn train algo=wrong train.ste", ["train.steps="]),
        ("metalearn nothing x", []),
        ("metalearn list x", []),
        ("metalearn train 'x", []),
    ],
)
def test_words_are_completed(line, expected):
    assert completed(line) == expected


def test_paths_are_completed_and_escaped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "maml run").mkdir(parents=True)
    (tmp_path / "file.zip").touch()
    for start in ("resume ", "compare ", "evaluate run=", "evaluate ", "compare x out="):
        last = start.rpartition(" ")[2]
        assert completed(f"metalearn {start}outp") == [f"{last}outputs/"]
    assert completed("metalearn resume outputs/ma") == [r"outputs/maml\ run/"]
    assert completed("metalearn train dataset.path=f") == ["dataset.path=file.zip "]
    assert completed("metalearn resume nowhere/") == []


def test_bash_gets_what_follows_the_equals_sign():
    script = (
        'source <(metalearn -sc install=bash); COMP_LINE="metalearn train algo=proto"; '
        'COMP_POINT=${#COMP_LINE}; _metalearn; printf "%s|" "${COMPREPLY[@]}"'
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert (done.stdout, done.stderr) == ("proto_maml |protonet |", "")
