"""Print versions, device, data and the result of a self-test, for bug reports."""

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from metalearn.cli import _arguments
from metalearn.system.errors import UserError, first_line

HELP = """metalearn doctor [data_dir=…] [cache_dir=…] [device=auto|cpu|cuda]

Prints versions, device, free disk space, available datasets, whether Weights & Biases would be
online, and the result of a self-test of about ten seconds (exit code 1 if it fails). Include the
output in a bug report.
"""
#: What shell completion offers.
TAKES: tuple[str, ...] = ()

_LIBRARIES = ("torch", "torchvision", "hydra-core", "omegaconf", "wandb", "numpy", "pillow", "rich")
#: A run that takes a few seconds.
_SMALL = (
    "experiment=demo", "dataset.num_classes=60", "dataset.image_size=14", "backbone.filters=8",
    "backbone.blocks=3", "episode.query=3", "train.steps=10", "train.meta_batch=4", "val.every=10",
    "val.episodes=20", "test.episodes=20", "logger=none",
)  # fmt: skip


def main(args: list[str]) -> int:
    """Run the command. Return the exit code."""
    overrides = _arguments.parse_settings("doctor", args)
    if any(word.partition("=")[0] not in ("data_dir", "cache_dir", "device") for word in overrides):
        raise UserError("doctor: takes only data_dir=, cache_dir= and device=")
    from metalearn.report.console import open_console

    return 0 if doctor(overrides, open_console()) else 1


def doctor(overrides: list[str], console: Any) -> bool:
    """Print the report; return whether the self-test passed."""
    from metalearn.config.checking import check_config
    from metalearn.config.composition import compose_config
    from metalearn.report.console import print_line, print_lines
    from metalearn.report.wandb_run import wandb_state

    settings = check_config(compose_config([*_SMALL, *overrides]))
    for title, lines in (
        ("versions", _versions()),
        ("device", _device(settings)),
        ("folders", _folders(settings)),
        ("datasets", _datasets(settings)),
        ("Weights & Biases", [wandb_state()]),
    ):
        print_line(console, title)
        print_lines(console, lines, "  ")
    print_line(console, "self-test")
    start = time.perf_counter()
    has_passed = True
    try:
        print_lines(console, _self_test(overrides), "  ")
    except Exception as error:  # the report is about whatever is wrong
        has_passed = False
        print_line(console, f"  FAILED: {type(error).__name__}: {first_line(error)}")
    outcome = "passed" if has_passed else "failed"
    print_line(console, f"  {outcome} in {time.perf_counter() - start:.1f} s")
    return has_passed


def _versions() -> Iterator[str]:
    from metalearn.report.environment import describe_environment

    environment = describe_environment("cpu")
    commit = environment["commit"] or "none (installed)"
    yield f"metalearn {environment['versions']['metalearn']}, commit {commit}"
    yield f"Python {platform.python_version()} on {platform.platform()}"
    yield ", ".join(f"{name} {metadata.version(name)}" for name in _LIBRARIES)


def _device(settings: Any) -> Iterator[str]:
    import torch

    from metalearn.engine.kernels import build as kernels
    from metalearn.report.environment import describe_environment
    from metalearn.run.parts import cache_folder, device_of

    yield describe_environment("cpu")["hardware"]
    cuda = torch.version.cuda
    if not torch.cuda.is_available():
        yield f"no CUDA device (torch is built for CUDA {cuda})" if cuda else "no CUDA device"
    for number in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(number).total_memory / 2**30
        yield f"{torch.cuda.get_device_name(number)}, {memory:.0f} GiB, CUDA {cuda}"
    yield f"device={settings.device} is {device_of(settings.device)}"
    kernels.load(cache_folder(settings))
    in_c = kernels.library() is not None
    yield f"CPU kernels: {'in C' if in_c else f'without C ({kernels.reason()})'}"


def _folders(settings: Any) -> Iterator[str]:
    from metalearn.run.parts import cache_folder, data_folder

    for name, path in (
        ("data_dir", data_folder(settings)),
        ("cache_dir", cache_folder(settings)),
        ("outputs", Path("outputs").absolute()),
    ):
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(existing).free / 2**30
        state = "" if existing == path else " (does not exist yet)"
        writable = "" if os.access(existing, os.W_OK) else ", cannot be written"
        yield f"{name}: {path}{state}, {free:.1f} GiB free{writable}"


def _datasets(settings: Any) -> Iterator[str]:
    from metalearn.run.describe import origins

    for one in origins(settings):
        where = f" ({', '.join(one['files'])})" if one["files"] else ""
        yield f"{one['dataset']}: {one['state']}{where}"


def _self_test(overrides: list[str]) -> Iterator[str]:
    """Test data, batching of tasks, a short training, a checkpoint and the lock."""
    import torch

    from metalearn.config.checking import check_config
    from metalearn.config.composition import compose_config
    from metalearn.engine import Engine
    from metalearn.report.folder import RunFolder
    from metalearn.report.progress import SILENT
    from metalearn.run import checkpoint, loop
    from metalearn.run.build import build
    from metalearn.system.lock import alone_in

    with tempfile.TemporaryDirectory() as name:
        files = RunFolder(Path(name))
        device = [word for word in overrides if word.startswith("device=")]
        run = build(check_config(compose_config([*_SMALL, *device, f"cache_dir={name}"])))
        tasks, half = run.train.draw(0, 4), torch.tensor(0.5, device=run.device)
        batched, single = (
            Engine(run.algorithm, strategy, 4).step(run.state, tasks, half).gradients
            for strategy in ("vmap", "loop")
        )
        worst = max(float((batched[key] - single[key]).abs().max()) for key in batched)
        if not worst < 1e-3:
            raise AssertionError(f"gradients of batched and single tasks differ by {worst}")
        yield f"gradients of batched and single tasks agree to {worst:.0e}"
        with alone_in(files.path):
            start = time.perf_counter()
            fitted = loop.fit(run, SILENT, files.path)
            rate = run.config.train.steps / (time.perf_counter() - start)
        content = checkpoint.load(files.best, run.device)
        for key, value in fitted.state.params.items():
            if not torch.equal(value, content["meta"][key]):
                raise AssertionError(f"the checkpoint holds another {key} than was written")
        yield f"{run.config.train.steps} meta-steps ({rate:.0f}/s), validated, saved and read back"
