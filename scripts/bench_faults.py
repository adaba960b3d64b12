"""Faults injected for real: the line that is printed and the state afterwards, into docs/reliability.md.

python scripts/bench_faults.py

Wants Linux, and root for the mounts of limited size and without permission to write; what cannot be injected here is named.
"""

import contextlib
import functools
import http.server
import io
import json
import os
import resource
import signal
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

from metalearn import checkpoint, report

_SMALL = (
    "dataset=glyphs", "dataset.num_classes=60", "dataset.image_size=16", "backbone.filters=8", "episode.query=3", "train.meta_batch=2",
    "train.log_every=5", "val.every=20", "val.episodes=10", "test.episodes=20", "checkpoint.every=10", "engine.threads=1",
)  # fmt: skip


class Place:
    """A folder to try things in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "run"
        self.environment = {
            **os.environ, "METALEARN_CACHE": str(folder / "cache"), "METALEARN_DATA": str(folder / "data"), "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
        }  # fmt: skip

    def start(self, *words: str, limit: Callable[[], None] | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "metalearn", *words],
            cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limit,
        )  # fmt: skip

    def train(
        self, *words: str, steps: int = 40, limit: Callable[[], None] | None = None
    ) -> tuple[int, str]:
        """Exit code, and the line that says what is wrong or noted."""
        process = self.start("train", "algo=protonet", *_SMALL, f"train.steps={steps}", "logger=none", f"hydra.run.dir={self.run}", *words, limit=limit)  # fmt: skip
        return self.ended(process)

    def ended(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        said, errors = process.communicate(timeout=300)
        if "Traceback" in errors:
            raise RuntimeError(errors)
        lines = [
            line for line in (errors + said).splitlines() if any(word in line for word in _TELLING)
        ]
        return process.returncode, (lines[0] if lines else "").replace(str(self.folder), "…")

    def wait_for_steps(self, process: subprocess.Popen[str]) -> None:
        while not (file := self.run / "metrics.jsonl").exists() or not file.stat().st_size:
            if process.poll() is not None:
                raise RuntimeError(process.communicate()[1])
            time.sleep(0.05)

    def kept(self) -> str:
        """The checkpoint that can be gone on from."""
        found = checkpoint.latest(self.run / "checkpoints", lambda line: None)
        return f"whole checkpoint of step {found['step']}" if found else "no checkpoint"

    def goes_on(self, *words: str) -> str:
        """What going on leads to."""
        code, line = self.train("resume=auto", *words)
        finished = code == 0 and (self.run / "result.json").exists()
        return "gone on with, it finished" if finished else f"going on: exit code {code}, {line}"


#: What the lines in question have in them.
_TELLING = ("metalearn: ", "damaged", "W&B: failed", "going back", "skipped", "SIGTERM:")

Fault = Callable[[Place], tuple[str, str]]


def _mounted(place: Place, options: str) -> contextlib.AbstractContextManager[None]:
    @contextlib.contextmanager
    def mounted() -> Iterator[None]:
        place.run.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place.run)],
            check=True,
            capture_output=True,
        )
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", str(place.run)], check=True)

    return mounted()


def disk_full(place: Place) -> tuple[str, str]:
    with _mounted(place, "size=180k"):
        code, line = place.train()
        state = place.kept()
        subprocess.run(["mount", "-o", "remount,size=20m", str(place.run)], check=True)
        return f"{line} (exit code {code})", f"{state}; with more room {place.goes_on()}"


def read_only(place: Place) -> tuple[str, str]:
    with _mounted(place, "ro"):
        code, line = place.train()
        return f"{line} (exit code {code})", "nothing was written"


def file_limit(place: Place) -> tuple[str, str]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    place.train(steps=0)  # makes the cache, which is larger than the limit
    subprocess.run(["rm", "-r", str(place.run)], check=True)
    code, line = place.train(limit=limit)
    return f"{line} (exit code {code})", f"{place.kept()}; without the limit {place.goes_on()}"


def full_device(place: Place) -> tuple[str, str]:
    code, line = place.train("hydra.run.dir=/dev/full")
    return f"{line} (exit code {code})", "nothing was written"


def damaged_cache(place: Place) -> tuple[str, str]:
    place.train(steps=0)
    (cache,) = (place.folder / "cache").glob("*.pt")
    cache.write_bytes(cache.read_bytes()[:-1000])
    subprocess.run(["rm", "-r", str(place.run)], check=True)
    code, line = place.train()
    return f"{line} (exit code {code})", "the cache is whole again and the run finished" if (
        place.run / "result.json"
    ).exists() else "no result"


def missing_cache(place: Place) -> tuple[str, str]:
    place.train(steps=0)
    subprocess.run(["rm", "-r", str(place.run), str(place.folder / "cache")], check=True)
    code, line = place.train()
    return f"{line or 'nothing'} (exit code {code})", "made again; the run finished" if (
        place.run / "result.json"
    ).exists() else "no result"


def not_finite(place: Place) -> tuple[str, str]:
    code, line = place.train("algo=maml", "algo.inner_lr=1e38", "algo.inner_steps=3")
    kept = sorted(path.name for path in (place.run / "nonfinite").iterdir())
    return f"{line} (exit code {code})", f"the episode is kept: {', '.join(kept)}"


def _little_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))


def out_of_memory(place: Place) -> tuple[str, str]:
    code, line = place.train(
        "algo=maml", "backbone.filters=256", "dataset.image_size=64", "episode.query=15", "train.meta_batch=64", "engine.strategy=vmap",
        "engine.task_chunk=64", "algo.inner_steps=5", limit=_little_memory,
    )  # fmt: skip
    return f"{line} (exit code {code})", place.kept()


def out_of_memory_before(place: Place) -> tuple[str, str]:
    code, line = place.train("dataset.image_size=1024", limit=_little_memory)
    return f"{line} (exit code {code})", place.kept()


def wandb_dies(place: Place) -> tuple[str, str]:
    process = place.start(
        "train",
        "algo=protonet",
        *_SMALL,
        "train.steps=4000",
        "val.every=1000",
        "logger=wandb",
        f"hydra.run.dir={place.run}",
    )
    place.wait_for_steps(process)
    services = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    for service in services:
        os.kill(int(service), signal.SIGKILL)
    code, line = place.ended(process)
    state = "the run finished" if (place.run / "result.json").exists() else "no result"
    return f"{line or 'nothing'} (exit code {code})", f"{len(services)} W&B service killed; {state}"


def two_processes(place: Place) -> tuple[str, str]:
    first = place.start(
        "train",
        "algo=protonet",
        *_SMALL,
        "train.steps=100000",
        "logger=none",
        f"hydra.run.dir={place.run}",
    )
    place.wait_for_steps(first)
    code, line = place.train("resume=auto", steps=100000)
    first.kill()
    first.wait()
    held = place.start("resume", str(place.run))
    time.sleep(8)
    going = (
        "the lock of the killed process is gone: the run goes on"
        if held.poll() is None
        else held.communicate()[1]
    )
    held.kill()
    held.wait()
    return f"{line} (exit code {code})", going


def killed_preparation(place: Place) -> tuple[str, str]:
    words = ("train", "algo=protonet", "dataset=glyphs", "dataset.num_classes=1200", "dataset.image_size=28", "logger=none", f"hydra.run.dir={place.run}")  # fmt: skip
    process = place.start(*words)
    while not list((place.folder / "cache").glob(".*.part")) and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    left = [path.name for path in (place.folder / "cache").iterdir()]
    code, line = place.train("dataset.num_classes=1200", "dataset.image_size=28", steps=1)
    whole = "prepared anew, the run finished" if code == 0 else f"exit code {code}, {line}"
    return "(killed)", f"left {len(left)} unfinished file, no cache; {whole}"


def stopped_by_signal(place: Place) -> tuple[str, str]:
    process = place.start(
        "train",
        "algo=protonet",
        *_SMALL,
        "train.steps=40000",
        "logger=none",
        f"hydra.run.dir={place.run}",
    )
    place.wait_for_steps(process)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    return (
        f"{errors.strip().splitlines()[-1].replace(str(place.folder), '…')} (exit code {process.returncode})",
        place.kept(),
    )


def malicious_checkpoint(place: Place) -> tuple[str, str]:
    place.train()

    class Malice:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {place.folder}/owned",)

    torch.save({"meta": Malice(), "fixed": {}}, place.run / "checkpoints/best.pt")
    code, line = place.ended(place.start("evaluate", f"run={place.run}"))
    return f"{line} (exit code {code})", "its code ran" if (
        place.folder / "owned"
    ).exists() else "its code did not run"


class _Server(http.server.SimpleHTTPRequestHandler):
    """Answers as a data set's address, but badly. how: cut, chunked (and cut), stall or lie."""

    def __init__(self, *arguments: object, how: str) -> None:
        self.how = how
        super().__init__(*arguments)  # type: ignore[arg-type]

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(200)
        if self.how == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"500\r\nonly this")
            return
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # who asked has left
            self.wfile.write(b"x" * (1000000 if self.how == "lie" else 1000))
        if self.how == "stall":
            time.sleep(120)


def download(how: str, place: Place) -> tuple[str, str]:
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Server, how=how)
    ) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{served.server_address[1]}"
        process = place.start(
            "train",
            "algo=protonet",
            "dataset=omniglot",
            f"dataset.url={address}",
            "logger=none",
            f"hydra.run.dir={place.run}",
        )
        code, line = place.ended(process)
        served.shutdown()
    left = list((place.folder / "data").rglob("*.*"))
    return (
        f"{line.replace(address, 'http://…')} (exit code {code})",
        f"{len(left)} files left behind",
    )


def hostile_archive(place: Place) -> tuple[str, str]:
    """Classes of pictures, and one file that wants to lie outside."""
    picture = io.BytesIO()
    Image.effect_noise((16, 16), 100).save(picture, "png")
    with zipfile.ZipFile(place.folder / "x.zip", "w") as archive:
        for number in range(40 * 20):
            archive.writestr(f"class{number // 20}/{number % 20}.png", picture.getvalue())
        archive.writestr("../../escaped/1.png", picture.getvalue())
    words = ("train", "algo=protonet", "dataset=folder", f"dataset.path={place.folder}/x.zip", "dataset.image_size=16", "backbone.filters=8",
             "train.steps=1", "val.episodes=2", "test.episodes=2", "logger=none", f"hydra.run.dir={place.run}")  # fmt: skip
    code, line = place.ended(place.start(*words))
    outside = list(place.folder.parent.parent.glob("escaped*")) + list(
        place.folder.parent.glob("escaped*")
    )
    return (
        f"{line or 'nothing'} (exit code {code})",
        "written outside" if outside else "nothing was written outside",
    )


FAULTS: dict[str, Fault] = {
    "disk full (a mount of 180 KB)": disk_full,
    "folder that cannot be written (a read-only mount)": read_only,
    "/dev/full as run folder": full_device,
    "files limited to 30 KB (RLIMIT_FSIZE)": file_limit,
    "cache cut short": damaged_cache,
    "cache gone": missing_cache,
    "loss not finite": not_finite,
    "out of memory in a step (RLIMIT_AS)": out_of_memory,
    "out of memory before it (RLIMIT_AS)": out_of_memory_before,
    "W&B's service killed": wandb_dies,
    "two processes in one folder, one killed": two_processes,
    "data preparation killed": killed_preparation,
    "SIGTERM": stopped_by_signal,
    "checkpoint with code in it": malicious_checkpoint,
    "archive with a path outside": hostile_archive,
    "download cut": functools.partial(download, "cut"),
    "download cut, in chunks": functools.partial(download, "chunked"),
    "download stalls": functools.partial(download, "stall"),
    "download lies": functools.partial(download, "lie"),
}


def main() -> None:
    rows = []
    only = sys.argv[1:]
    for title, fault in FAULTS.items():
        if only and not any(word in title for word in only):
            continue
        with tempfile.TemporaryDirectory() as name:
            try:
                line, state = fault(Place(Path(name)))
            except (OSError, subprocess.CalledProcessError) as error:
                line, state = f"could not be injected here ({error})", ""
        rows.append({"fault": title, "printed": line.replace("|", "\\|"), "afterwards": state})
        print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    environment = report.environment("cpu")
    foot = f"`python scripts/bench_faults.py`, commit {environment['commit']}."
    if not only:
        fill(
            ROOT / "docs/reliability.md",
            "faults: written by scripts/bench_faults.py",
            [*report.markdown_table(rows), "", foot],
        )


if __name__ == "__main__":
    main()
