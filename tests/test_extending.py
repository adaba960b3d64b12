"""The package of docs/extending.md, written unchanged into an empty folder, installed and run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import reading

from metalearn.config import plugins
from metalearn.system.errors import UserError

_PAGE = (Path(__file__).parent.parent / "docs/extending.md").read_text()
#: What makes the page's commands short.
_SMALL = (
    "train.steps=2", "val.every=2", "val.episodes=4", "test.episodes=4", "logger=none", "hydra.run.dir=run", "episode.train.way=5",
    "episode.train.query=3", "episode.query=3", "device=cpu", "train.meta_batch=2",
)  # fmt: skip


def files() -> dict[str, str]:
    """The files of the page by name."""
    return dict(re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```$", _PAGE, re.S | re.M))


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The package, installed into a folder of its own."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name, content in files().items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(content)
    uv = Path(sys.executable).with_name("uv")
    done = subprocess.run(
        [uv, "pip", "install", "--quiet", "--offline", "--no-build-isolation", "--no-deps", "--target", site, source],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return site


@pytest.mark.slow
def test_every_command_of_the_page_runs(package, metalearn, tmp_path):
    commands = [
        line for block in re.findall(r"```sh\n(.*?)```", _PAGE, re.S) for line in block.splitlines()
    ]
    assert len(commands) == 8
    for number, line in enumerate(commands):
        words = shlex.split(line)
        if words[0] == "metalearn":
            small = [*_SMALL, f"hydra.run.dir=run{number}"]
            small += ["dataset.num_classes=60", "dataset.image_size=16"] if "glyphs" in line else []
            done = metalearn(*words[1:], *small, path=str(package))
            assert done.returncode == 0, line + done.stdout + done.stderr
    assert "neighbour" in metalearn("list", path=str(package)).stdout
    # Later commands find the plugin by its entry point alone; what is not named is not imported.
    again = metalearn("evaluate", "run=run0", "episode.shot=2", path=str(package))
    assert again.returncode == 0, again.stderr
    (check,) = [shlex.split(line)[2] for line in commands if line.startswith("python")]
    code = f"{check}; import metalearn, sys; metalearn.load('run0'); print('fewshot_extras.momentum' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr


@pytest.mark.slow
def test_nothing_stored_can_name_a_plugin(package, tmp_path, metalearn, monkeypatch):
    """Not installed, the package must be named each time; a run folder that asks for it gets an explanation."""
    plain = tmp_path / "path"
    plain.mkdir()
    (plain / "fewshot_extras").symlink_to(
        package / "fewshot_extras"
    )  # importable, but with no entry point
    words = [
        "train",
        "algo=neighbour",
        "dataset=glyphs",
        "dataset.num_classes=60",
        "dataset.image_size=16",
    ]
    words += ["backbone.filters=4", *_SMALL]

    def refused(*command: str) -> str:
        done = metalearn(*command, path=str(plain))
        assert done.returncode == 2, done.stdout + done.stderr
        return str(done.stderr)

    assert "there is no such algo" in refused(*words)
    done = metalearn(*words, "plugins=[fewshot_extras]", path=str(plain))
    assert done.returncode == 0, done.stderr
    assert "plugins=[fewshot_extras]" in (tmp_path / "run/result.json").read_text()
    line = refused("evaluate", "run=run")
    assert "add plugins=[fewshot_extras]" in line
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text() + "plugins: [fewshot_extras]\n")
    assert "plugins: nothing reads this key" in refused(
        "evaluate", "run=run", "plugins=[fewshot_extras]"
    )
    config.write_text(config.read_text().replace("plugins: [fewshot_extras]\n", ""))
    for command in (("evaluate", "run=run"), ("resume", "run"), ("compare", "run")):
        done = metalearn(*command, "plugins=[fewshot_extras]", path=str(plain))
        assert done.returncode == 0, done.stderr
    assert "plugins=[nowhere]: cannot be imported" in refused("list", "plugins=[nowhere]")


def test_a_plugin_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(plugins, "_named", [])
    with pytest.raises(UserError, match=r"plugins=\[nowhere\]: cannot be imported"):
        plugins.add(["nowhere"])
    assert plugins.named() == ()


@pytest.mark.parametrize(("kind", "limit"), reading.LIMITS.items())
def test_what_a_stranger_must_read_is_short(kind, limit):
    assert reading.lines(kind) <= limit
