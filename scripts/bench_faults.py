"""Inject real faults and write the printed line and the resulting state to docs/reliability.md.

python scripts/bench_faults.py [title …]

Requires Linux, and root for the small and the read-only mounts. A fault that cannot be injected on
this machine is reported as such.
"""

import collections
import contextlib
import functools
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import foreign_faults
from pages import ROOT, fill
from sandbox import Sandbox

from metalearn.report import tables
from metalearn.report.environment import describe_environment

#: Injects a fault; returns the printed line with the exit code, and the state afterwards.
Fault = Callable[[Sandbox], tuple[str, str]]


@contextlib.contextmanager
def _mounted(sandbox: Sandbox, options: str) -> Iterator[None]:
    sandbox.run.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(sandbox.run)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(sandbox.run)], check=True)


#: Sizes of disks in KB: from no room for the first file to room for all but the last ones.
_DISKS = (
    16, 28, 40, 60, 100, 180, 300, 450, 500, 600, 700, 900, 1000, 1200, 1500, 1900, 2200, 3000,
    4000, 5000,
)  # fmt: skip


def disk_full(logger: str, sandbox: Sandbox) -> tuple[str, str]:
    """Fill disks of many sizes, with the default network, and resume with more space."""
    lines, states = collections.Counter[str](), collections.Counter[str]()
    for size in _DISKS:
        own = Sandbox(sandbox.folder / f"{size}")
        own.environment["METALEARN_CACHE"] = sandbox.environment["METALEARN_CACHE"]
        with _mounted(own, f"size={size}k"):
            code, line = own.train("backbone.filters=64", logger=logger)
            lines[f"{line} (exit code {code})"] += 1
            subprocess.run(["mount", "-o", "remount,size=40m", str(own.run)], check=True)
            state = "" if code else "had room; "
            states[state + own.resume("backbone.filters=64", logger=logger)] += 1
    return tuple(  # type: ignore[return-value]
        "; ".join(f"{count} times: {text}" for text, count in one.most_common())
        for one in (lines, states)
    )


def read_only(sandbox: Sandbox) -> tuple[str, str]:
    """Run in a folder on a read-only mount."""
    with _mounted(sandbox, "ro"):
        code, line = sandbox.train()
        return f"{line} (exit code {code})", "nothing was written"


def removed_folder(sandbox: Sandbox) -> tuple[str, str]:
    """Remove the run folder of a running training with W&B."""
    process = sandbox.start_training(steps=100_000, logger="wandb")
    sandbox.wait_for_steps(process)
    shutil.rmtree(sandbox.run)
    code, line = sandbox.finish(process)
    return f"{line} (exit code {code})", "made again" if sandbox.run.exists() else "not made again"


def full_output(sandbox: Sandbox) -> tuple[str, str]:
    """Train with a standard output that cannot be written."""
    with open("/dev/full", "w") as full:
        process = sandbox.start_training(output=full)
        errors = process.communicate(timeout=300)[1].strip()
    return f"{errors or 'nothing'} (exit code {process.returncode})", sandbox.state


def wandb_without_network(sandbox: Sandbox) -> tuple[str, str]:
    """Train with a key of W&B, and a server that accepts connections but never answers."""
    del sandbox.environment["WANDB_MODE"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        sandbox.environment |= {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": address}
        start = time.monotonic()
        code, line = sandbox.train(logger="wandb")
        with_wandb = time.monotonic() - start
    shutil.rmtree(sandbox.run)
    start = time.monotonic()
    sandbox.train()
    seconds = with_wandb - (time.monotonic() - start)
    line = line.replace(address, "http://…")
    return f"{line} (exit code {code})", f"{sandbox.state}, {seconds:.0f} s later than without"


def file_limit(sandbox: Sandbox) -> tuple[str, str]:
    """Limit the size of each file (RLIMIT_FSIZE)."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    sandbox.train(steps=0)  # builds the cache, which is larger than the limit
    shutil.rmtree(sandbox.run)
    code, line = sandbox.train(limit=limit)
    return (
        f"{line} (exit code {code})",
        f"{sandbox.latest_checkpoint()}; without the limit {sandbox.resume()}",
    )


def full_device(sandbox: Sandbox) -> tuple[str, str]:
    """Give /dev/full as the run folder."""
    code, line = sandbox.train("hydra.run.dir=/dev/full")
    return f"{line} (exit code {code})", "nothing was written"


def damaged_cache(sandbox: Sandbox) -> tuple[str, str]:
    """Truncate the cache file by 1000 bytes."""
    sandbox.train(steps=0)
    (cache,) = (sandbox.folder / "cache").glob("*.pt")
    cache.write_bytes(cache.read_bytes()[:-1000])
    shutil.rmtree(sandbox.run)
    code, line = sandbox.train()
    return f"{line} (exit code {code})", f"the cache was rebuilt and {sandbox.state}"


def missing_cache(sandbox: Sandbox) -> tuple[str, str]:
    """Delete the cache folder."""
    sandbox.train(steps=0)
    shutil.rmtree(sandbox.run)
    shutil.rmtree(sandbox.folder / "cache")
    code, line = sandbox.train()
    return f"{line or 'nothing'} (exit code {code})", f"rebuilt; {sandbox.state}"


def not_finite(sandbox: Sandbox) -> tuple[str, str]:
    """Make the loss overflow with a huge inner learning rate."""
    code, line = sandbox.train("algo=maml", "algo.inner_lr=1e38", "algo.inner_steps=3")
    names = sorted(path.name for path in (sandbox.run / "nonfinite").iterdir())
    return f"{line} (exit code {code})", f"the episode is saved: {', '.join(names)}"


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))


def out_of_memory(sandbox: Sandbox) -> tuple[str, str]:
    """Exceed the memory limit in a training step."""
    large = ("backbone.filters=256", "dataset.image_size=64", "episode.query=15",
             "train.meta_batch=64", "engine.strategy=vmap", "engine.task_chunk=64")  # fmt: skip
    code, line = sandbox.train("algo=maml", "algo.inner_steps=5", *large, limit=_limit_memory)
    return f"{line} (exit code {code})", sandbox.latest_checkpoint()


def out_of_memory_before(sandbox: Sandbox) -> tuple[str, str]:
    """Exceed the memory limit before the first step."""
    code, line = sandbox.train("dataset.image_size=1024", limit=_limit_memory)
    return f"{line} (exit code {code})", sandbox.latest_checkpoint()


def wandb_dies(sandbox: Sandbox) -> tuple[str, str]:
    """Kill W&B's service process during training."""
    process = sandbox.start_training("val.every=1000", steps=4000, logger="wandb")
    sandbox.wait_for_steps(process)
    services = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    for service in services:
        os.kill(int(service), signal.SIGKILL)
    code, line = sandbox.finish(process)
    state = f"{len(services)} W&B service killed; {sandbox.state}"
    return f"{line or 'nothing'} (exit code {code})", state


def two_processes(sandbox: Sandbox) -> tuple[str, str]:
    """Start a second process in the folder of a running one, then kill the first and resume."""
    first = sandbox.start_training(steps=100_000)
    sandbox.wait_for_steps(first)
    code, line = sandbox.train("resume=auto", steps=100_000)
    first.kill()
    first.wait()
    resumed = sandbox.start("resume", str(sandbox.run))
    time.sleep(8)
    state = (
        "the lock of the killed process is released: the run resumes"
        if resumed.poll() is None
        else resumed.communicate()[1]
    )
    resumed.kill()
    resumed.wait()
    return f"{line} (exit code {code})", state


def killed_preparation(sandbox: Sandbox) -> tuple[str, str]:
    """Kill the process while it prepares the dataset."""
    data = ("dataset.num_classes=1200", "dataset.image_size=28")
    process = sandbox.start_training(*data)
    while not list((sandbox.folder / "cache").glob(".*.part")) and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    unfinished = list((sandbox.folder / "cache").iterdir())
    code, line = sandbox.train(*data, steps=1)
    state = "prepared again, the run finished" if code == 0 else f"exit code {code}, {line}"
    return "(killed)", f"{len(unfinished)} unfinished file, no cache; {state}"


def stopped_by_signal(sandbox: Sandbox) -> tuple[str, str]:
    """Stop a training with SIGTERM."""
    process = sandbox.start_training(steps=40_000)
    sandbox.wait_for_steps(process)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    line = errors.strip().splitlines()[-1].replace(str(sandbox.folder), "…")
    return f"{line} (exit code {process.returncode})", sandbox.latest_checkpoint()


FAULTS: dict[str, Fault] = {
    "disk full (20 mounts of 16 KB to 5 MB, Conv4)": functools.partial(disk_full, "none"),
    "disk full (the same mounts), with W&B": functools.partial(disk_full, "wandb"),
    "run folder removed during the run": removed_folder,
    "standard output full (/dev/full)": full_output,
    "W&B with a key but no network": wandb_without_network,
    "read-only run folder (a read-only mount)": read_only,
    "/dev/full as run folder": full_device,
    "files limited to 30 KB (RLIMIT_FSIZE)": file_limit,
    "truncated cache": damaged_cache,
    "deleted cache": missing_cache,
    "non-finite loss": not_finite,
    "out of memory in a step (RLIMIT_AS)": out_of_memory,
    "out of memory before the first step (RLIMIT_AS)": out_of_memory_before,
    "W&B's service killed": wandb_dies,
    "two processes in one folder, one killed": two_processes,
    "data preparation killed": killed_preparation,
    "SIGTERM": stopped_by_signal,
    "checkpoint that contains code": foreign_faults.malicious_checkpoint,
    "archive with a path that leads outside": foreign_faults.hostile_archive,
    "truncated download": functools.partial(foreign_faults.download, "cut"),
    "truncated chunked download": functools.partial(foreign_faults.download, "chunked"),
    "stalled download": functools.partial(foreign_faults.download, "stall"),
    "download with wrong content": functools.partial(foreign_faults.download, "lie"),
}


def main() -> None:
    """Inject the faults, or those whose title contains an argument, and write the table."""
    rows = []
    only = sys.argv[1:]
    for title, fault in FAULTS.items():
        if only and not any(part in title for part in only):
            continue
        with tempfile.TemporaryDirectory() as name:
            try:
                line, state = fault(Sandbox(Path(name)))
            except (OSError, subprocess.CalledProcessError) as error:
                line, state = f"could not be injected here ({error})", ""
        rows.append({"fault": title, "printed": line.replace("|", "\\|"), "afterwards": state})
        print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    environment = describe_environment("cpu")
    source = f"`python scripts/bench_faults.py`, commit {environment['commit']}."
    if not only:
        fill(
            ROOT / "docs/reliability.md",
            "faults: written by scripts/bench_faults.py",
            [*tables.markdown_table(rows), "", source],
        )


if __name__ == "__main__":
    main()
