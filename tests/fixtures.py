"""Shared fixtures: small datasets, small runs, and commands in separate processes."""

import functools
import http.server
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch.utils import _pytree as pytree

from metalearn.config import checking, choices, composition
from metalearn.engine import process
from metalearn.engine.kernels import build as kernel_build
from metalearn.run.build import Run, build
from tests import command
from tests.command import Command

torch.set_num_threads(1)
process.ALL_THREADS = 1  # tests run in parallel

ALGORITHMS = sorted(choices.options("algo"))

#: Overrides that make any run small: an easy dataset, a narrow network, few episodes.
SMALL = [
    "dataset=glyphs", "dataset.num_classes=60", "dataset.jitter=0.5", "dataset.image_size=16",
    "backbone.filters=8", "episode.query=3", "train.steps=2", "val.episodes=4", "test.episodes=6",
    "logger=none",
]  # fmt: skip


def to_float64(tree: Any) -> Any:
    """Convert the floating-point tensors of a tree to float64."""
    return pytree.tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, tree)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests that require a GPU where there is none."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("requires a CUDA device")


@pytest.fixture(autouse=True)
def _same_folder():
    """Return to the folder in which the tests started: `resume` changes to that of its run."""
    here = Path.cwd()
    yield
    os.chdir(here)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def compose(cache_dir: Path):
    def compose_small(*overrides: str) -> DictConfig:
        return composition.compose_config([*SMALL, f"cache_dir={cache_dir}", *overrides])

    return compose_small


@pytest.fixture
def make_run(compose):
    def make(*overrides: str) -> Run:
        return build(checking.check_config(compose(*overrides)))

    return make


@pytest.fixture
def start(cache_dir: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    """Start the command in an empty folder, as a user would, in a separate process."""
    output = tmp_path_factory.mktemp("output")
    commands: list[Command] = []

    def run(
        *arguments: str,
        cwd: Path = tmp_path,
        memory: int | None = None,
        path: str | None = None,
        **environment: str | None,
    ) -> Command:
        folders = {"METALEARN_CACHE": str(cache_dir), "METALEARN_DATA": str(tmp_path / "data")}
        variables = {**folders, **environment}
        commands.append(command.start(arguments, cwd, output, variables, memory, path))
        return commands[-1]

    yield run
    for one in commands:
        if one.is_running:
            one.process.kill()
        one.process.join()


@pytest.fixture
def metalearn(start):
    """Run the command like `start`, and wait until it ends."""

    def run(*arguments: str, timeout: float = 120, **options: Any) -> Command:
        return start(*arguments, **options).wait(timeout)

    return run


@pytest.fixture
def ranks(start):
    """Start the command in two processes that share the work, as torchrun would."""

    def run(*arguments: str) -> list[Command]:
        return [start(*arguments, **environment) for environment in command.ranks(2)]

    return run


@pytest.fixture
def server(tmp_path):
    """Serve a folder over HTTP on this machine: (address, folder)."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    ) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_address[1]}", folder
        http_server.shutdown()


_CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture
def browse(start, tmp_path):
    """Return a function that serves a state and opens the page in a headless Chromium."""
    if not _CHROMIUM.exists():
        pytest.skip(f"there is no {_CHROMIUM}")
    playwright = pytest.importorskip("playwright.sync_api")

    def opened(*words, token=None):
        state = ["port=0", f"state={tmp_path}/state"]
        served = start("serve", *words, *state, METALEARN_TOKEN=token)
        served.wait_until(lambda: "http://" in served.stdout)
        page = browser.new_page()
        page.set_default_timeout(20_000)
        for event in ("console", "pageerror"):  # also what the content security policy refuses
            page.on(event, lambda message: faults.append(str(message)))
        page.on("request", lambda request: addresses.append(request.url))
        page.goto(served.stdout.split()[0])
        return page

    faults: list[str] = []
    addresses: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        yield opened
        browser.close()
    assert not [one for one in faults if "401" not in one]
    assert all(re.match("(http://127.0.0.1:|blob:|data:)", address) for address in addresses)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The C implementation."""
    kernel_build.load(tmp_path_factory.mktemp("kernels"))
    if kernel_build.library() is None:
        pytest.skip(kernel_build.reason())


@pytest.fixture(params=["c", "torch"])
def either(request, monkeypatch):
    """Computations with the C implementation, or without it."""
    if request.param == "c":
        request.getfixturevalue("library")
    else:
        monkeypatch.setattr(kernel_build._State, "library", None)
        monkeypatch.setattr(kernel_build, "load", lambda folder: None)
