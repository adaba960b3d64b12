"""The environment stored with a result."""

import subprocess

import pytest

import metalearn
from metalearn.cli import _arguments, evaluate
from metalearn.report import plots
from metalearn.report.environment import describe_environment
from metalearn.system.errors import UserError


def test_commit_has_a_plus_if_the_code_was_changed(tmp_path, monkeypatch):
    def git(*args):
        user = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *user, *args], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    code, result = tmp_path / "metalearn/__init__.py", tmp_path / "benchmarks/one.json"
    for path in (code, result, tmp_path / "conf/base.yaml"):
        path.parent.mkdir()
        path.write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    monkeypatch.setattr(metalearn, "__file__", str(code))
    commit = git("rev-parse", "--short=10", "HEAD")
    result.write_text("2")
    assert describe_environment("cpu")["commit"] == commit
    code.write_text("2")
    assert describe_environment("cpu")["commit"] == f"{commit}+"


def test_labels_that_no_font_has_or_that_are_too_long_are_drawn(tmp_path, recwarn):
    rows = [
        {"step": step, "train.loss": 1.0, "val.mse": 0.5, "val.mse_ci95": 0.1} for step in (1, 2)
    ]
    plots.draw_learning_curve(rows, "mse", tmp_path / "a.png", "run \udcff")
    columns = {"panel \udcff": [("1" * 500, 0.5, 0.1), ("b", 0.6, 0.1)]}
    plots.draw_comparison(columns, "accuracy", tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size and (tmp_path / "b.png").stat().st_size
    # matplotlib's; others may be of objects that earlier tests left
    assert not [one for one in recwarn.list if one.category is UserWarning]


def test_words_longer_than_a_path_may_be_are_refused_in_one_line():
    with pytest.raises(UserError, match="should name a folder"):
        _arguments.parse(["algo=maml", "--config-dir", "a" * 5000])
    with pytest.raises(UserError, match="takes a folder"):
        evaluate.main(["a" * 5000 + "=1"])
