"""Somebody else's run folder is read safely, and without any effect outside of it."""

import copy
import io
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console

import metalearn
from metalearn.cli.compare import compare
from metalearn.config import composition
from metalearn.config.checking import check_config
from metalearn.report.console import open_console, print_line
from metalearn.report.folder import RunFolder
from metalearn.report.tables import result_row, result_table
from metalearn.report.tracker import Tracker
from metalearn.run import checkpoint, resuming
from metalearn.run.evaluate import evaluate
from metalearn.system import reading
from metalearn.system.atomic import atomic_writer, make_folder
from metalearn.system.errors import UserError
from metalearn.system.lock import alone_in
from metalearn.tasks.metrics import ACCURACY

_STORED = Path(__file__).parent / "data/old_runs"
_RED = "\x1b[31mred\x1b]0;title\x07"


@pytest.fixture
def folder(tmp_path):
    """A finished run that somebody else may have changed."""
    shutil.copytree(_STORED / "protonet", tmp_path / "foreign/run")
    return tmp_path / "foreign/run"


@pytest.fixture
def precious(tmp_path):
    """A file that links lead to and that nothing may change."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/text").write_text("do not touch")
    yield tmp_path / "precious"
    assert [path.name for path in (tmp_path / "precious").iterdir()] == ["text"]
    assert (tmp_path / "precious/text").read_text() == "do not touch"


@pytest.fixture
def terminal(monkeypatch):
    """Return a function that opens a console on a terminal, and one that returns its content."""
    output = io.StringIO()
    monkeypatch.setattr(output, "isatty", lambda: True)

    def opened():
        monkeypatch.setattr(sys, "stdout", output)  # in the test: pytest replaces it before
        return open_console()

    return opened, output.getvalue


def bomb(value: str, reference: str) -> str:
    """Return YAML with nine levels of nine aliases."""
    lines = [f"a0: &a0 {value}"]
    for level in range(1, 10):
        aliases = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} {reference.format(f'[{aliases}]')}")
    return "\n".join(lines)


def replace_by(kind: str, path: Path) -> None:
    """Replace a file by something that is none, or that has no end."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        with path.open("wb") as stream:
            stream.truncate(1 << 40)
    else:
        targets = {"device": "/dev/zero", "loop": path.name, "dangling": "/nowhere"}
        path.symlink_to(targets[kind])


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "huge", "loop", "dangling"])
def test_only_files_of_a_limited_size_are_read(kind, folder):
    files = RunFolder(folder)
    for path, read in (
        (files.config, lambda: composition.load_config(folder)),
        (files.result, files.read_result),
        (files.command, files.read_command),
        (files.best, lambda: checkpoint.load(files.best, torch.device("cpu"))),
    ):
        replace_by(kind, path)
        with pytest.raises(UserError) as caught:
            read()
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (bomb("[1]", "{}"), "too many values"),
        (bomb("{x: 1}", "{{<<: {}}}"), "could not determine a constructor"),
        ("a: &a [*a]", "nested too deeply"),
        ("a: " + "[" * 5000, "nest"),
        ("a: " + "[" * 40 + "]" * 40, "nested too deeply"),
        ("\n".join(" " * n + "a:" for n in range(400)), "nested too deeply"),
        ('a: "\\udcff"\nb: ' + "[" * 900, "nested too deeply"),
        ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("train:\n  lr: ${oc.env:HOME}", "train.lr is an interpolation"),
        ("seed: " + "9" * 5000, "config.yaml"),
        ("seed: !!int " + "1:" * 50_000 + "1", "config.yaml"),
        ("seed: !!int ''", "config.yaml"),
        ("1: a", "a name that is not text"),
        ("seed: !!set {a}", "seed is a set"),
        ("seed: 2020-01-01", "seed is a date"),
        ("<<: {a: 1}", "could not determine a constructor"),
        ("- a", "should hold named values"),
        ("", "should hold named values"),
        ("a: [", "line 2"),
        ("a: \udcff", "not UTF-8"),
        ("a: 1\n" * 100_000, "bytes"),
    ],
    ids=lambda text: text[:12],
)
def test_hostile_configuration_is_one_line(text, reason, folder):
    (folder / "config.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    for read in (composition.load_config, metalearn.load):
        with pytest.raises(UserError, match=reason) as caught:
            read(folder)
        assert "config.yaml" in str(caught.value) and len(str(caught.value)) < 300


def test_number_of_very_many_digits_is_one_line(compose):
    config = compose()
    config.train.lr = int("9" * 400)
    with pytest.raises(UserError, match=r"train\.lr: has too large a number"):
        check_config(config)


def test_own_configurations_are_read_as_written(compose, tmp_path):
    content: Any = OmegaConf.to_container(compose("seed=3", "train.lr=1e-5"), resolve=True)
    content["data_dir"] = (
        "/a/\udcff \U0001f469\u200d\U0001f4bb\n\x1b[31m/1e5"  # any path of the system
    )
    content["train"]["clip_norm"] = float("inf")
    for surrogates in (True, False):
        if not surrogates:
            content["data_dir"] = "2020-01-01"
        text = OmegaConf.to_yaml(OmegaConf.create(content))
        (tmp_path / "config.yaml").write_text(text)
        assert reading.read_yaml(tmp_path / "config.yaml") == content


@pytest.mark.parametrize(
    "text", ["", "[1]", "null", "{", "[" * 100_000, '{"a":' * 40 + "1" + "}" * 40, "9" * 10**6]
)
def test_hostile_json_is_one_line(text, folder):
    files = RunFolder(folder)
    for path, read in ((files.result, files.read_result), (files.command, files.read_command)):
        path.write_text(text)
        with pytest.raises(UserError, match=f"{path.name} is not as metalearn writes it: "):
            read()


def places(node, path=()):
    """Yield the path of every value of parsed JSON."""
    for key in node if isinstance(node, dict) else range(len(node)):
        yield (*path, key)
        if isinstance(node[key], dict | list):
            yield from places(node[key], (*path, key))


def test_result_with_a_wrong_type_anywhere_is_refused_or_usable(tmp_path):
    stored = json.loads((_STORED / "protonet/result.json").read_text())
    values: list[Any] = [None, {}, [], "x", True, -1, 1e308 * 10, 10**400, [[]], {"x": 1}]
    refused = 0
    for path in places(stored):
        for value in values:
            content = copy.deepcopy(stored)
            node = content
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value
            (tmp_path / "result.json").write_text(json.dumps(content))
            try:
                result = RunFolder(tmp_path).read_result()
            except UserError:
                refused += 1
                continue
            console = Console(file=io.StringIO())
            console.print(result_table([result_row(result.name, result)]))
            metalearn.report.tables.print_details(console, result)
            assert result.seconds / 60 < 1e300 and result.hardware is not None
    assert refused > 200


def test_one_unreadable_run_does_not_end_compare(folder, precious, terminal):
    good = shutil.copytree(_STORED / "reptile", folder.parent / "good")
    shutil.copytree(folder, folder.parent / "protocol")
    result = json.loads((folder / "result.json").read_text())
    (folder.parent / "protocol/result.json").write_text(json.dumps({**result, "protocol": None}))
    (folder / "result.json").write_text(json.dumps({**result, "name": _RED, "seconds": 1e308}))
    replace_by("pipe", shutil.copytree(good, folder.parent / "pipe") / "test_scores.csv")
    (shutil.copytree(good, folder.parent / f"a{_RED}") / "config.yaml").write_text(bomb("1", "{}"))
    lying = shutil.copytree(good, folder.parent / "lying")  # the protocol is not that of its id
    content = json.loads((lying / "result.json").read_text())
    content["protocol"]["way"] = 3
    (lying / "result.json").write_text(json.dumps(content))
    for name in ("md", "csv", "png"):
        (folder.parent / f"comparison.{name}").symlink_to(precious / "text")
    opened, printed = terminal
    compare([folder.parent], None, opened())
    lines = printed().splitlines()
    for name in ("run", "protocol", "pipe", "a\\x1b", "lying"):
        assert any(f"left out: {folder.parent}/{name}" in line for line in lines), name
    assert any("protocol should hold named values" in line for line in lines)
    for name in ("md", "csv", "png"):
        assert not (folder.parent / f"comparison.{name}").is_symlink()
    assert "reptile glyphs" in (folder.parent / "comparison.md").read_text()


def test_foreign_text_has_no_effect_on_the_terminal(folder, terminal, tmp_path):
    result = json.loads((folder / "result.json").read_text())
    hostile = {**result, "name": f"$\\frac{{$ {_RED}", "environment": {"hardware": _RED}}
    (folder / "result.json").write_text(json.dumps(hostile))
    with (folder / "config.yaml").open("a") as stream:
        stream.write(f"{json.dumps(_RED)}: 1\n")
    opened, printed = terminal
    console = opened()
    compare([folder], tmp_path / f"out{_RED}", console)
    print_line(console, f"a{_RED}\nmetalearn: a second line :smile: [bold]")
    assert ":smile: [bold]" in printed()
    console.print(_RED, markup=False)
    assert "\\x1b[31mred" in printed() and _RED not in printed()
    assert not any(mark in printed() for mark in ("\x1b]", "\x07", "\nmetalearn:"))
    for name in ("comparison.md", "comparison.csv"):
        assert "\x1b" not in (tmp_path / f"out{_RED}" / name).read_text()


def test_evaluate_says_why_a_result_is_unreadable(folder):
    (folder / "result.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"result\.json is not UTF-8"):
        evaluate(folder, [], "test", None, Console(quiet=True))
    (folder / "result.json").unlink()
    with pytest.raises(UserError, match="not finished; to finish it: metalearn resume"):
        evaluate(folder, [], "test", None, Console(quiet=True))


def test_nothing_is_written_through_a_link(folder, precious, cache_dir):
    text = precious / "text"
    (folder / "x.json").symlink_to(text)
    (folder / f".x.json.{os.getpid()}.part").symlink_to(text)
    with atomic_writer(folder / "x.json") as stream:
        stream.write(b"new")
    assert (folder / "x.json").read_bytes() == b"new" and not (folder / "x.json").is_symlink()
    (folder / ".lock").symlink_to(text)
    with pytest.raises(UserError, match=r"\.lock is a link"), alone_in(folder):
        pass
    for name in ("evaluations", "nonfinite", "wandb"):
        (folder / name).symlink_to(precious)
        with pytest.raises(UserError, match=f"{name} is a link"):
            make_folder(folder / name)
    with pytest.raises(UserError, match="evaluations is a link"):
        evaluate(folder, [f"cache_dir={cache_dir}"], "test", None, Console(quiet=True))
    checkpoints = folder.rename(folder.parent / "moved") / "checkpoints"
    shutil.rmtree(checkpoints)
    checkpoints.symlink_to(precious)
    with pytest.raises(UserError, match="checkpoints is a link"):
        checkpoint.save(checkpoints / "text", {"meta": {}, "fixed": {}})


def nested(depth: int) -> list:
    """Return a list in a list, this many times."""
    return [nested(depth - 1)] if depth else []


def test_checkpoint_of_what_no_checkpoint_holds_is_refused(tmp_path):
    shared: list[Any] = [0] * 1000
    for _ in range(5):
        shared = [shared] * 1000
    path = tmp_path / "x.pt"
    contents: list[dict[Any, Any]] = [
        {"x": nested(100)},
        {"x": shared},
        {"x": torch.zeros(1).expand(1 << 40)},
        {"x": torch.zeros(3, device="meta")},
        {"x": torch.zeros(3).to_sparse()},
        {(1, 2): 0},
        {"meta": {"w": "text"}},
    ]
    for content in contents:
        torch.save({"meta": {}, "fixed": {}, **content}, path)
        with pytest.raises(checkpoint.CorruptCheckpoint, match=r"x\.pt is not a"):
            checkpoint.load(path, torch.device("cpu"))
    checkpoint.save(path, {"meta": {"w": torch.zeros(1000, 1000)}, "fixed": {}})
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(tmp_path / "y.pt", "w", 8) as small:
        for name in stored.namelist():
            small.writestr(name, stored.read(name))
    with pytest.raises(checkpoint.CorruptCheckpoint, match=r"y\.pt is not a readable checkpoint"):
        checkpoint.load(tmp_path / "y.pt", torch.device("cpu"))


def test_foreign_rows_of_metrics_end_the_history(compose, tmp_path):
    settings = check_config(compose())
    files = RunFolder(tmp_path)
    good = '{"step": 1, "train.loss": 2.0, "seconds": 3.0}\n'
    for foreign in ("[]", '"step"', '{"step": "x"}', '{"step": 2, "train.loss": []}', "[" * 9999):
        files.metrics.write_text(f"{good}{foreign}\n{good}")
        tracker = Tracker(settings, ACCURACY, files, Console(quiet=True), "id", 5, [])
        tracker.close()
        assert (tracker.rows, tracker.seconds_before) == ([json.loads(good)], 3.0)
        assert files.metrics.read_text() == good


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"threads": {}}', '{"threads": 100000, "train": {}, "test": {}}', '{"train": 1}'],
)
def test_foreign_engine_choices_are_one_line(content, folder):
    (folder / "engine.json").write_text(content)
    for read in (
        lambda: evaluate(folder, [], "test", None, Console(quiet=True)),
        lambda: resuming.check_choices(RunFolder(folder), {}),
    ):
        with pytest.raises(UserError, match=r"engine\.json"):
            read()
