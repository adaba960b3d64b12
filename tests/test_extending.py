"""The package in docs/extending.md, written unchanged to an empty folder, installs and runs."""

import os
import re
import shlex
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import reading

from metalearn.cli._arguments import take_plugins
from metalearn.config import components, plugins
from metalearn.system.errors import UserError

_DOCS = Path(__file__).parent.parent / "docs"
_PAGE = "".join((_DOCS / name).read_text() for name in ("extending.md", "add-dataset.md"))
#: Appended to the page's commands so that they end soon.
_SMALL = (
    "train.steps=2", "val.every=2", "val.episodes=4", "test.episodes=4", "logger=none",
    "hydra.run.dir=run", "episode.train.way=5", "episode.train.query=3", "episode.query=3",
    "device=cpu", "train.meta_batch=2",
)  # fmt: skip


def files() -> dict[str, str]:
    """Return the files on the page by name."""
    return dict(re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```$", _PAGE, re.S | re.M))


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Install the package into a separate folder and return the folder."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name, content in files().items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(content)
    uv = Path(sys.executable).with_name("uv")
    options = ["--quiet", "--offline", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [uv, "pip", "install", *options, "--target", site, source], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return site


@pytest.mark.slow
def test_every_command_of_the_page_runs(package, metalearn, tmp_path):
    commands = [
        line for block in re.findall(r"```sh\n(.*?)```", _PAGE, re.S) for line in block.splitlines()
    ]
    assert len(commands) == 8
    for number, line in enumerate(commands):
        args = shlex.split(line)
        if args[0] == "metalearn":
            small = [*_SMALL, f"hydra.run.dir=run{number}"]
            small += ["dataset.num_classes=60", "dataset.image_size=16"] if "glyphs" in line else []
            done = metalearn(*args[1:], *small, path=str(package))
            assert done.returncode == 0, line + done.stdout + done.stderr
    assert "neighbour" in metalearn("list", path=str(package)).stdout
    # Later commands find the plugin by its entry point and import only the modules they need.
    evaluation = metalearn("evaluate", "run=run0", "episode.shot=2", path=str(package))
    assert evaluation.returncode == 0, evaluation.stderr
    (check,) = [shlex.split(line)[2] for line in commands if line.startswith("python")]
    code = f"{check}; import metalearn, sys; metalearn.load('run0'); "
    code += "print('fewshot_extras.extrapolation' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr


@pytest.mark.slow
def test_run_folder_cannot_load_a_plugin(package, tmp_path, metalearn, monkeypatch):
    """A package that is not installed must be named in every command, and the error says how."""
    plain = tmp_path / "path"  # the package is importable here, but has no entry point
    plain.mkdir()
    (plain / "fewshot_extras").symlink_to(package / "fewshot_extras")
    overrides = [
        "train",
        "algo=neighbour",
        "dataset=glyphs",
        "dataset.num_classes=60",
        "dataset.image_size=16",
    ]
    overrides += ["backbone.filters=4", *_SMALL]

    def error_of(*command: str) -> str:
        done = metalearn(*command, path=str(plain))
        assert done.returncode == 2, done.stdout + done.stderr
        return str(done.stderr)

    assert "there is no such algo" in error_of(*overrides)
    done = metalearn(*overrides, "plugins=[fewshot_extras]", path=str(plain))
    assert done.returncode == 0, done.stderr
    assert "plugins=[fewshot_extras]" in (tmp_path / "run/result.json").read_text()
    assert "add plugins=[fewshot_extras]" in error_of("evaluate", "run=run")
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text() + "plugins: [fewshot_extras]\n")
    assert "plugins: there is no such setting" in error_of(
        "evaluate", "run=run", "plugins=[fewshot_extras]"
    )
    config.write_text(config.read_text().replace("plugins: [fewshot_extras]\n", ""))
    for command in (("evaluate", "run=run"), ("resume", "run"), ("compare", "run")):
        done = metalearn(*command, "plugins=[fewshot_extras]", path=str(plain))
        assert done.returncode == 0, done.stderr
    assert "plugins=[nowhere]: cannot be imported" in error_of("list", "plugins=[nowhere]")


def test_missing_plugin_is_named_in_the_error(monkeypatch):
    monkeypatch.setattr(plugins, "_named", [])
    with pytest.raises(UserError, match=r"plugins=\[nowhere\]: cannot be imported"):
        plugins.add(["nowhere"])
    assert plugins.named() == ()


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Write an importable package that is not allowed yet; return its name."""
    monkeypatch.setattr(plugins, "_named", [])
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / f"plugin_{uuid.uuid4().hex}"
    folder.mkdir()
    for name, content in {
        "__init__": "",
        "losses": "def focal(prediction, y):\n    return prediction.mean()\n",
        "broken": "import no_such_dependency\n",
        "outdated": "from json import no_such_function\n",
    }.items():
        (folder / f"{name}.py").write_text(content)
    return folder.name


def test_import_error_inside_a_plugin_is_reported(plugin):
    plugins.add([plugin])
    for module, reason in {
        "broken": r"cannot be imported \(No module named 'no_such_dependency'\)",
        "outdated": r"cannot be imported \(cannot import name 'no_such_function'",
        "nowhere": "there is no such",
        "losses.focal": "there is no such",
    }.items():
        target = f"{plugin}.{module}.Class"
        with pytest.raises(UserError, match=rf"algo\._target_={target}: {reason}"):
            components.component({"_target_": target}, "algo")
        with pytest.raises(UserError, match=rf"loss\.name={target}: {reason}"):
            plugins.find(target, {}, "loss.name")


def test_function_of_a_package_must_be_allowed(plugin):
    name = f"{plugin}.losses.focal"
    with pytest.raises(UserError, match=rf"not a plugin .*add plugins=\[{plugin}\]"):
        plugins.find(name, {}, "loss.name")
    plugins.add(plugin)  # a string is one name
    assert callable(plugins.find(name, {}, "loss.name"))


def test_dotted_plugin_allows_only_what_is_below_it(plugin, monkeypatch):
    monkeypatch.setattr(plugins, "installed", lambda: (f"{plugin}.losses",))
    assert callable(plugins.find(f"{plugin}.losses.focal", {}, "loss.name"))
    for name in (f"{plugin}.broken.x", f"{plugin}.losses_of_others.x"):
        with pytest.raises(UserError, match="is not a plugin"):
            plugins.find(name, {}, "loss.name")


@pytest.mark.parametrize("form", ["plugins=[{}]", "+plugins=[{}]", "plugins=['{}']", "plugins={}"])
def test_plugins_on_the_command_line_have_several_forms(plugin, form):
    for quoted in (form, form.replace("'", '"')):
        assert take_plugins(["seed=1", quoted.format(plugin)]) == ["seed=1"]
    assert plugins.named() == (plugin,)


@pytest.mark.parametrize(("kind", "limit"), reading.LIMITS.items())
def test_lines_to_read_before_extending_are_limited(kind, limit):
    assert reading.lines(kind) <= limit
