"""The environment stored with a result."""

import subprocess

import metalearn
from metalearn.report.environment import describe_environment


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
