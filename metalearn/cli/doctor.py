"""`metalearn doctor`: what this machine is and has, and a self-test; what to paste into a bug report."""

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from omegaconf import OmegaConf
from rich.console import Console

from metalearn.config import checking, components, composition
from metalearn.config.schema import RunConfig
from metalearn.engine import Engine
from metalearn.report import tracker
from metalearn.report.console import print_line
from metalearn.report.environment import describe_environment
from metalearn.run import checkpoint, loop
from metalearn.run.build import build, device_of, folder_of
from metalearn.system.errors import first_line
from metalearn.system.lock import alone_in

_LIBRARIES = ("torch", "torchvision", "hydra-core", "omegaconf", "wandb", "numpy", "pillow", "rich")
#: A run small enough for a few seconds.
_SMALL = (
    "experiment=demo", "dataset.num_classes=60", "dataset.image_size=14", "backbone.filters=8", "backbone.blocks=3",
    "episode.query=3", "train.steps=10", "train.meta_batch=4", "val.every=10", "val.episodes=20", "test.episodes=20", "logger=none",
)  # fmt: skip


def doctor(overrides: list[str], console: Console) -> bool:
    """Prints a report. overrides: `data_dir`, `cache_dir`, `device`. Returns: whether the self-test passed."""
    settings = checking.checked(composition.composed([*_SMALL, *overrides]))
    passed = True
    for title, lines in (
        ("versions", _versions()),
        ("device", _device(settings)),
        ("folders", _folders(settings)),
        ("data sets", _data_sets(settings)),
        ("Weights & Biases", [tracker.wandb_state()]),
    ):
        print_line(console, title)
        for line in lines:
            print_line(console, f"  {line}")
    print_line(console, "self-test")
    start = time.perf_counter()
    try:
        for line in _self_test(overrides):
            print_line(console, f"  {line}")
    except Exception as error:  # whatever is wrong here is what the report is for
        passed = False
        print_line(console, f"  FAILED: {type(error).__name__}: {first_line(error)}")
    print_line(
        console, f"  {'passed' if passed else 'failed'} in {time.perf_counter() - start:.1f} s"
    )
    return passed


def _versions() -> Iterator[str]:
    environment = describe_environment("cpu")
    yield f"metalearn {environment['versions']['metalearn']}, commit {environment['commit'] or 'none (installed)'}"
    yield f"Python {platform.python_version()} on {platform.platform()}"
    yield ", ".join(f"{name} {metadata.version(name)}" for name in _LIBRARIES)


def _device(settings: RunConfig) -> Iterator[str]:
    yield describe_environment("cpu")["hardware"]
    if not torch.cuda.is_available():
        yield (
            f"no CUDA device (torch is built for CUDA {torch.version.cuda})"
            if torch.version.cuda
            else "no CUDA device"
        )
    for number in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(number).total_memory / 2**30
        yield f"{torch.cuda.get_device_name(number)}, {memory:.0f} GiB, CUDA {torch.version.cuda}"
    yield f"device={settings.device} is {device_of(settings.device)}"


def _folders(settings: RunConfig) -> Iterator[str]:
    data_dir, cache_dir = (
        folder_of(settings.data_dir, ".local/share"),
        folder_of(settings.cache_dir, ".cache"),
    )
    for name, path in (
        ("data_dir", data_dir),
        ("cache_dir", cache_dir),
        ("outputs", Path("outputs").absolute()),
    ):
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(there).free / 2**30
        writable = "" if os.access(there, os.W_OK) else ", cannot be written"
        yield f"{name}: {path}{'' if there == path else ' (not there yet)'}, {free:.1f} GiB free{writable}"


def _data_sets(settings: RunConfig) -> Iterator[str]:
    data_dir = folder_of(settings.data_dir, ".local/share")
    for name in composition.options("dataset"):
        composed = OmegaConf.to_container(
            composition.composed([f"dataset={name}"]).dataset, resolve=True
        )
        assert isinstance(composed, dict)
        files = components.make(
            {str(key): value for key, value in composed.items()}, "dataset"
        ).files(data_dir)
        missing = [path for path in files if not path.exists()]
        if not files:
            yield f"{name}: needs no files"
        else:
            yield f"{name}: {'not in ' if missing else 'in '}{', '.join(map(str, missing or files))}"


def _self_test(overrides: list[str]) -> Iterator[str]:
    """Data, both ways to batch tasks, a short training, a checkpoint and its checksum, the lock."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [
            *_SMALL,
            *(word for word in overrides if word.startswith("device=")),
            f"cache_dir={folder}",
        ]
        run = build(checking.checked(composition.composed(words)))
        tasks, half = run.train.draw(0, 4), torch.tensor(0.5, device=run.device)
        ways = [
            Engine(run.algorithm, strategy, 4).step(run.state, tasks, half).gradients
            for strategy in ("vmap", "loop")
        ]
        worst = max(float((ways[0][name] - ways[1][name]).abs().max()) for name in ways[0])
        if not worst < 1e-3:
            raise AssertionError(f"tasks batched and tasks one by one differ by {worst}")
        yield f"tasks batched and one by one agree to {worst:.0e}"
        with alone_in(folder):
            start = time.perf_counter()
            fitted = loop.fit(run, loop.Silent(), folder)
            steps = run.config.train.steps / (time.perf_counter() - start)
        kept = checkpoint.load(folder / "checkpoints" / checkpoint.BEST, run.device)
        if not all(
            torch.equal(value, kept["meta"][name]) for name, value in fitted.state.params.items()
        ):
            raise AssertionError("a checkpoint does not hold what was written")
        yield f"{run.config.train.steps} meta-steps ({steps:.0f} a second), validated, saved and read back"
