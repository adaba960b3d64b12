"""Inject real faults and write the printed line and the resulting state to docs/reliability.md.

python scripts/bench_faults.py [title …]

Requires Linux, and root for the small and the read-only mounts. A fault that cannot be injected on
this machine is reported as such.
"""

import collections
import contextlib
import functools
import http.server
import io
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from pages import ROOT, fill
from PIL import Image

from metalearn.report import tables
from metalearn.report.environment import describe_environment
from metalearn.report.folder import RunFolder
from metalearn.run import checkpoint

_SMALL = (
    "dataset=glyphs", "dataset.num_classes=60", "dataset.image_size=16", "backbone.filters=8",
    "episode.query=3", "train.meta_batch=2", "train.log_every=5", "val.every=20", "val.episodes=10",
    "test.episodes=20", "checkpoint.every=10", "engine.threads=1",
)  # fmt: skip


class Sandbox:
    """A temporary folder with its own caches, in which commands run."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.run = folder / "run"
        self.environment = {
            **os.environ,
            "METALEARN_CACHE": str(folder / "cache"),
            "METALEARN_DATA": str(folder / "data"),
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
        }

    def start(self, *args: str, limit: Callable[[], None] | None = None) -> subprocess.Popen[str]:
        """Start a metalearn command; `limit` runs first in the child, to set resource limits."""
        return subprocess.Popen(
            [sys.executable, "-m", "metalearn", *args],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=limit,
        )

    def train(
        self,
        *args: str,
        steps: int = 40,
        limit: Callable[[], None] | None = None,
        logger: str = "none",
    ) -> tuple[int, str]:
        """Run a training; return its exit code and its error or warning line."""
        small = (*_SMALL, f"train.steps={steps}", f"logger={logger}", f"hydra.run.dir={self.run}")
        return self.finish(self.start("train", "algo=protonet", *small, *args, limit=limit))

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Wait for a process; return its exit code and its error or warning line."""
        output, errors = process.communicate(timeout=300)
        if "Traceback" in errors or (process.returncode == 1 and len(errors.splitlines()) != 1):
            raise RuntimeError(errors)
        lines = [
            line for line in (errors + output).splitlines() if any(mark in line for mark in _MARKS)
        ]
        return process.returncode, (lines[0] if lines else "").replace(str(self.folder), "…")

    def wait_for_steps(self, process: subprocess.Popen[str]) -> None:
        """Wait until the run has logged its first training step."""
        while not (file := self.run / "metrics.jsonl").exists() or not file.stat().st_size:
            if process.poll() is not None:
                raise RuntimeError(process.communicate()[1])
            time.sleep(0.05)

    def latest_checkpoint(self) -> str:
        """Describe the checkpoint that a resumed run would start from."""
        latest = checkpoint.latest(RunFolder(self.run), lambda line: None)
        return f"intact checkpoint of step {latest['step']}" if latest else "no checkpoint"

    def resume(self, *args: str, logger: str = "none") -> str:
        """Resume the run and describe the outcome."""
        code, line = self.train("resume=auto", *args, logger=logger)
        finished = code == 0 and (self.run / "result.json").exists()
        return "resumed and finished" if finished else f"resumed: exit code {code}, {line}"


#: Parts of the lines that report an error or a warning.
_MARKS = (
    "metalearn: ",
    "corrupt",
    "W&B: failed",
    "cannot be reached",
    "previous checkpoint",
    "skipped",
    "SIGTERM:",
)

#: Injects a fault; returns the printed line with the exit code, and the state afterwards.
Fault = Callable[[Sandbox], tuple[str, str]]


def _mounted(sandbox: Sandbox, options: str) -> contextlib.AbstractContextManager[None]:
    @contextlib.contextmanager
    def mounted() -> Iterator[None]:
        sandbox.run.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(sandbox.run)],
            check=True,
            capture_output=True,
        )
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", str(sandbox.run)], check=True)

    return mounted()


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
    arguments = ("algo=protonet", *_SMALL, "train.steps=100000", "logger=wandb")
    process = sandbox.start("train", *arguments, f"hydra.run.dir={sandbox.run}")
    sandbox.wait_for_steps(process)
    shutil.rmtree(sandbox.run)
    code, line = sandbox.finish(process)
    return f"{line} (exit code {code})", "made again" if sandbox.run.exists() else "not made again"


def full_output(sandbox: Sandbox) -> tuple[str, str]:
    """Train with a standard output that cannot be written."""
    arguments = ("train", "algo=protonet", *_SMALL, "train.steps=40", "logger=none")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "metalearn", *arguments, f"hydra.run.dir={sandbox.run}"],
            cwd=sandbox.folder,
            env=sandbox.environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    line = f"{done.stderr.strip() or 'nothing'} (exit code {done.returncode})"
    return line, _state_of(sandbox)


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
    return f"{line} (exit code {code})", f"{_state_of(sandbox)}, {seconds:.0f} s later than without"


def _state_of(sandbox: Sandbox) -> str:
    return "the run finished" if (sandbox.run / "result.json").exists() else "no result"


def file_limit(sandbox: Sandbox) -> tuple[str, str]:
    """Limit the size of each file (RLIMIT_FSIZE)."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    sandbox.train(steps=0)  # builds the cache, which is larger than the limit
    subprocess.run(["rm", "-r", str(sandbox.run)], check=True)
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
    subprocess.run(["rm", "-r", str(sandbox.run)], check=True)
    code, line = sandbox.train()
    return f"{line} (exit code {code})", "the cache was rebuilt and the run finished" if (
        sandbox.run / "result.json"
    ).exists() else "no result"


def missing_cache(sandbox: Sandbox) -> tuple[str, str]:
    """Delete the cache folder."""
    sandbox.train(steps=0)
    subprocess.run(["rm", "-r", str(sandbox.run), str(sandbox.folder / "cache")], check=True)
    code, line = sandbox.train()
    return f"{line or 'nothing'} (exit code {code})", "rebuilt; the run finished" if (
        sandbox.run / "result.json"
    ).exists() else "no result"


def not_finite(sandbox: Sandbox) -> tuple[str, str]:
    """Make the loss overflow with a huge inner learning rate."""
    code, line = sandbox.train("algo=maml", "algo.inner_lr=1e38", "algo.inner_steps=3")
    names = sorted(path.name for path in (sandbox.run / "nonfinite").iterdir())
    return f"{line} (exit code {code})", f"the episode is saved: {', '.join(names)}"


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))


def out_of_memory(sandbox: Sandbox) -> tuple[str, str]:
    """Exceed the memory limit in a training step."""
    code, line = sandbox.train(
        "algo=maml",
        "backbone.filters=256",
        "dataset.image_size=64",
        "episode.query=15",
        "train.meta_batch=64",
        "engine.strategy=vmap",
        "engine.task_chunk=64",
        "algo.inner_steps=5",
        limit=_limit_memory,
    )
    return f"{line} (exit code {code})", sandbox.latest_checkpoint()


def out_of_memory_before(sandbox: Sandbox) -> tuple[str, str]:
    """Exceed the memory limit before the first step."""
    code, line = sandbox.train("dataset.image_size=1024", limit=_limit_memory)
    return f"{line} (exit code {code})", sandbox.latest_checkpoint()


def wandb_dies(sandbox: Sandbox) -> tuple[str, str]:
    """Kill W&B's service process during training."""
    process = sandbox.start(
        "train",
        "algo=protonet",
        *_SMALL,
        "train.steps=4000",
        "val.every=1000",
        "logger=wandb",
        f"hydra.run.dir={sandbox.run}",
    )
    sandbox.wait_for_steps(process)
    services = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    for service in services:
        os.kill(int(service), signal.SIGKILL)
    code, line = sandbox.finish(process)
    state = f"{len(services)} W&B service killed; {_state_of(sandbox)}"
    return f"{line or 'nothing'} (exit code {code})", state


def two_processes(sandbox: Sandbox) -> tuple[str, str]:
    """Start a second process in the folder of a running one, then kill the first and resume."""
    first = sandbox.start(
        "train",
        "algo=protonet",
        *_SMALL,
        "train.steps=100000",
        "logger=none",
        f"hydra.run.dir={sandbox.run}",
    )
    sandbox.wait_for_steps(first)
    code, line = sandbox.train("resume=auto", steps=100000)
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
    process = sandbox.start(
        "train",
        "algo=protonet",
        "dataset=glyphs",
        *data,
        "logger=none",
        f"hydra.run.dir={sandbox.run}",
    )
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
    process = sandbox.start(
        "train",
        "algo=protonet",
        *_SMALL,
        "train.steps=40000",
        "logger=none",
        f"hydra.run.dir={sandbox.run}",
    )
    sandbox.wait_for_steps(process)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    line = errors.strip().splitlines()[-1].replace(str(sandbox.folder), "…")
    return f"{line} (exit code {process.returncode})", sandbox.latest_checkpoint()


def malicious_checkpoint(sandbox: Sandbox) -> tuple[str, str]:
    """Evaluate a checkpoint whose pickle runs a shell command."""
    sandbox.train()

    class Malice:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {sandbox.folder}/owned",)

    torch.save({"meta": Malice(), "fixed": {}}, sandbox.run / "checkpoints/best.pt")
    code, line = sandbox.finish(sandbox.start("evaluate", f"run={sandbox.run}"))
    return f"{line} (exit code {code})", "its code ran" if (
        sandbox.folder / "owned"
    ).exists() else "its code did not run"


class _Server(http.server.SimpleHTTPRequestHandler):
    """Serve a dataset's files with a fault: `how` is cut, chunked (and cut), stall or lie."""

    def __init__(self, *arguments: object, how: str) -> None:
        self.how = how
        super().__init__(*arguments)  # type: ignore[arg-type]

    def log_message(self, *args: object) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        """Pretend that the file exists."""
        self.send_response(200)
        self.end_headers()

    def do_GET(self) -> None:
        """Send a faulty response."""
        self.send_response(200)
        if self.how == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"500\r\nonly this")
            return
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client has closed the connection
            self.wfile.write(b"x" * (1000000 if self.how == "lie" else 1000))
        if self.how == "stall":
            time.sleep(120)


def download(how: str, sandbox: Sandbox) -> tuple[str, str]:
    """Download a dataset from a faulty server; `how` as in `_Server`."""
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Server, how=how)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        process = sandbox.start(
            "train",
            "algo=protonet",
            "dataset=omniglot",
            f"dataset.url={address}",
            "logger=none",
            f"hydra.run.dir={sandbox.run}",
        )
        code, line = sandbox.finish(process)
        server.shutdown()
    files = list((sandbox.folder / "data").rglob("*.*"))
    return (
        f"{line.replace(address, 'http://…')} (exit code {code})",
        f"{len(files)} files left behind",
    )


def hostile_archive(sandbox: Sandbox) -> tuple[str, str]:
    """Give a zip of image classes in which one path leads outside the target folder."""
    image = io.BytesIO()
    Image.effect_noise((16, 16), 100).save(image, "png")
    with zipfile.ZipFile(sandbox.folder / "x.zip", "w") as archive:
        for number in range(40 * 20):
            archive.writestr(f"class{number // 20}/{number % 20}.png", image.getvalue())
        archive.writestr("../../escaped/1.png", image.getvalue())
    process = sandbox.start(
        "train",
        "algo=protonet",
        "dataset=folder",
        f"dataset.path={sandbox.folder}/x.zip",
        "dataset.image_size=16",
        "backbone.filters=8",
        "train.steps=1",
        "val.episodes=2",
        "test.episodes=2",
        "logger=none",
        f"hydra.run.dir={sandbox.run}",
    )
    code, line = sandbox.finish(process)
    outside = list(sandbox.folder.parent.parent.glob("escaped*")) + list(
        sandbox.folder.parent.glob("escaped*")
    )
    return (
        f"{line or 'nothing'} (exit code {code})",
        "written outside" if outside else "nothing was written outside",
    )


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
    "checkpoint that contains code": malicious_checkpoint,
    "archive with a path that leads outside": hostile_archive,
    "truncated download": functools.partial(download, "cut"),
    "truncated chunked download": functools.partial(download, "chunked"),
    "stalled download": functools.partial(download, "stall"),
    "download with wrong content": functools.partial(download, "lie"),
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
