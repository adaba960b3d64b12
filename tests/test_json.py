"""`--json`: one JSON document on standard output, and nothing else there."""

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from metalearn.cli._completion import candidates
from metalearn.cli.main import _command, commands, main
from metalearn.config import choices
from metalearn.run.train import train


@pytest.fixture
def command(monkeypatch, capfd):
    """Run the command in this process; return its exit code, output and errors."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["metalearn", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capfd.readouterr()

    return run


@pytest.fixture
def folder(compose, tmp_path):
    train(compose("algo=protonet"), tmp_path / "run", "protonet glyphs", [], Console(quiet=True))
    return tmp_path / "run"


def test_evaluate_and_compare_print_one_document(command, folder, cache_dir):
    evaluate = ("evaluate", folder, "episode.shot=2", f"cache_dir={cache_dir}")
    code, out, err = command(*evaluate, "--json")
    content = json.loads(out)
    assert code == 0 and "5w 2s 3q" in err
    assert content["results"] == [json.loads(Path(file).read_text()) for file in content["files"]]
    assert {one["protocol"]["statistics"] for one in content["results"]} == {"population", "query"}

    code, out, err = command(*evaluate, "curve=way", "at=2,3", "--json")
    curve = json.loads(out)
    assert code == 0 and [point["way"] for point in curve["points"]] == [2, 3]
    assert (curve["curve"], curve["metric"]) == ("way", "accuracy")
    assert all(0 <= point["mean"] <= 1 < point["episodes"] for point in curve["points"])

    (folder.parent / "other").mkdir()
    (folder.parent / "other" / "config.yaml").write_text("")
    code, out, err = command("compare", folder.parent, "--json")
    compared = json.loads(out)
    assert code == 0 and "left out" in err
    own = json.loads((folder / "result.json").read_text())
    ids = {own["protocol_id"], *(one["protocol_id"] for one in content["results"])}
    assert {one["protocol_id"] for one in compared["measurements"]} == ids
    mean = {one["protocol_id"]: one["mean"] for one in compared["methods"]}
    assert mean[own["protocol_id"]] == pytest.approx(own["test"]["accuracy"]["mean"])
    assert "other" in compared["left_out"][0] and len(compared["files"]) == 3

    code, out, err = command("evaluate", folder, "split=nowhere", "--json")
    assert (code, out) == (2, "") and "split=nowhere" in err


def test_list_prints_every_choice(command):
    code, out, err = command("list", "--json")
    content = json.loads(out)
    assert (code, err) == (0, "")
    assert all("models" in Path(name).parts for name in content.pop("run"))
    for group, known in content.items():
        lines = choices.options(group)
        assert {name: one["description"] for name, one in known.items()} == lines
    assert content["algo"]["protonet"]["family"] == "metric"
    text = command("list")[1]
    assert all(name in text for known in content.values() for name in known)


def test_json_is_in_help_and_completion():
    takes = {name: _command(name).TAKES for name in commands()}
    printing = [name for name in commands() if "--json" in _command(name).HELP]
    assert printing == [name for name in commands() if "--json" in takes[name]]
    assert {"compare", "evaluate", "list", "predict"} <= set(printing)
    for name in printing:
        assert "--json " in candidates(f"metalearn {name} --j", takes)
