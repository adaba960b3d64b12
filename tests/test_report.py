"""What a result says of where it was made."""

import subprocess

import metalearn
from metalearn.report.environment import describe_environment


def test_the_commit_says_whether_the_code_is_that_of_it(tmp_path, monkeypatch):
    def git(*words):
        own = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *own, *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    code, figure = tmp_path / "metalearn/__init__.py", tmp_path / "benchmarks/one.json"
    for path in (code, figure, tmp_path / "conf/base.yaml"):
        path.parent.mkdir()
        path.write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    monkeypatch.setattr(metalearn, "__file__", str(code))
    commit = git("rev-parse", "--short=10", "HEAD")
    figure.write_text("2")
    assert describe_environment("cpu")["commit"] == commit
    code.write_text("2")
    assert describe_environment("cpu")["commit"] == f"{commit}+"
