"""Faults of what comes from others: a checkpoint with code, a faulty server, a hostile archive."""

import contextlib
import functools
import http.server
import io
import os
import threading
import time
import zipfile
from collections.abc import Callable

import torch
from PIL import Image
from sandbox import Sandbox


def malicious_checkpoint(sandbox: Sandbox) -> tuple[str, str]:
    """Evaluate a checkpoint whose pickle runs a shell command."""
    sandbox.train()

    class Malice:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {sandbox.folder}/owned",)

    torch.save({"meta": Malice(), "fixed": {}}, sandbox.run / "checkpoints/best.pt")
    code, line = sandbox.finish(sandbox.start("evaluate", f"run={sandbox.run}"))
    has_run = (sandbox.folder / "owned").exists()
    return f"{line} (exit code {code})", "its code ran" if has_run else "its code did not run"


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
        words = ("algo=protonet", "dataset=omniglot", f"dataset.url={address}", "logger=none")
        process = sandbox.start("train", *words, f"hydra.run.dir={sandbox.run}")
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
    words = ("algo=protonet", "dataset=folder", f"dataset.path={sandbox.folder}/x.zip",
             "dataset.image_size=16", "backbone.filters=8", "train.steps=1", "val.episodes=2",
             "test.episodes=2", "logger=none", f"hydra.run.dir={sandbox.run}")  # fmt: skip
    code, line = sandbox.finish(sandbox.start("train", *words))
    folders = sandbox.folder.parents[:2]
    outside = [path for folder in folders for path in folder.glob("escaped*")]
    return (
        f"{line or 'nothing'} (exit code {code})",
        "written outside" if outside else "nothing was written outside",
    )
