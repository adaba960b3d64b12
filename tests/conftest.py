"""Shared pieces of the tests: small datasets, small runs, and the command line in a process of its own."""

import functools
import http.server
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch.utils import _pytree as pytree

from metalearn.config import checking, composition
from metalearn.engine import process
from metalearn.run.build import Run, build
from tests import command
from tests.command import Command

torch.set_num_threads(1)
process._ALL_THREADS = 1  # several tests run at a time

ALGORITHMS = sorted(composition.options("algo"))

#: Overrides that make any run small: an easy data set, a thin network, few episodes.
SMALL = [
    "dataset=glyphs", "dataset.num_classes=60", "dataset.jitter=0.5", "dataset.image_size=16", "backbone.filters=8",
    "episode.query=3", "train.steps=2", "val.episodes=4", "test.episodes=6", "logger=none",
]  # fmt: skip


def doubled(tree: Any) -> Any:
    """The same tree in float64."""
    return pytree.tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, tree)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def compose(cache_dir: Path):
    def composed(*overrides: str) -> DictConfig:
        return composition.composed([*SMALL, f"cache_dir={cache_dir}", *overrides])

    return composed


@pytest.fixture
def make_run(compose):
    def made(*overrides: str) -> Run:
        return build(checking.checked(compose(*overrides)))

    return made


@pytest.fixture
def start(cache_dir: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    """Starts the command in an empty folder, as a user would, in a process of its own."""
    output = tmp_path_factory.mktemp("output")
    started: list[Command] = []

    def run(
        *words: str,
        cwd: Path = tmp_path,
        memory: int | None = None,
        path: str | None = None,
        **environment: str | None,
    ) -> Command:
        folders = {"METALEARN_CACHE": str(cache_dir), "METALEARN_DATA": str(tmp_path / "data")}
        started.append(command.start(words, cwd, output, {**folders, **environment}, memory, path))
        return started[-1]

    yield run
    for one in started:
        if one.is_running:
            one.process.kill()
        one.process.join()


@pytest.fixture
def metalearn(start):
    """Runs the command as `start` does, to its end."""

    def run(*words: str, timeout: float = 120, **options: Any) -> Command:
        return start(*words, **options).wait(timeout)

    return run


@pytest.fixture
def ranks(start):
    """Starts the command in two processes that share their work, as torchrun would."""

    def run(*words: str) -> list[Command]:
        return [start(*words, **environment) for environment in command.ranks(2)]

    return run


@pytest.fixture
def server(tmp_path):
    """A local web server over a folder: (address, folder)."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    ) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_address[1]}", folder
        served.shutdown()
