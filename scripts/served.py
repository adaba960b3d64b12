"""Start `metalearn serve` in a process, and send requests and images to it."""

import contextlib
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

TOKEN = "the token of this benchmark"
#: Content type of `form`.
FORM = "multipart/form-data; boundary=x"


class Server:
    """`metalearn serve` in a process."""

    def __init__(self, *words: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "metalearn", "serve", "port=0", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "METALEARN_TOKEN": TOKEN},
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        match = re.search(r":(\d+) ", line)
        if match is None:
            raise SystemExit(f"metalearn serve did not start: {line}{self._process.communicate()}")
        self.port = int(match[1])

    def memory(self) -> float:
        """Return the resident memory in MiB."""
        text = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1024

    def end(self, number: int = signal.SIGINT) -> str:
        """Send a signal; return what the server printed to standard error."""
        self._process.send_signal(number)
        return self._process.communicate()[1]

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        """Send a request; return status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, {"Authorization": f"Bearer {TOKEN}", **names})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def form(self, path: str, *fields: tuple[str, str, bytes]) -> tuple[int, Any]:
        """Send a form of (name, file name, content); return status and parsed JSON."""
        status, text = self.send("POST", path, form(*fields), Content_Type=FORM)
        return status, json.loads(text)


def form(*fields: tuple[str, str, bytes]) -> bytes:
    """Return the body of a form."""
    parts = []
    for name, file, content in fields:
        extra = f'; filename="{file}"' if file else ""
        head = f'--x\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'
        parts.append(head.encode("utf-8", "surrogatepass") + content + b"\r\n")
    return b"".join(parts) + b"--x--\r\n"


def image(kind: int, seed: int, size: int = 64) -> bytes:
    """Return a PNG of a shape in ink: five kinds."""
    rng = np.random.default_rng([seed, kind])
    picture = Image.new("L", (size, size), 255)
    pen = ImageDraw.Draw(picture)
    low, high = size * (0.15 + 0.1 * rng.random(2)), size * (0.75 + 0.1 * rng.random(2))
    box = [low[0], low[1], high[0], high[1]]
    if kind == 0:
        pen.ellipse(box, outline=0, width=5)
    elif kind == 1:
        pen.line(box, fill=0, width=5)
    elif kind == 2:
        pen.rectangle(box, outline=0, width=5)
    elif kind == 3:
        pen.line([box[0], box[3], box[2], box[1]], fill=0, width=5)
    else:
        pen.line([size / 2, box[1], size / 2, box[3]], fill=0, width=5)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def new(server: Server, shots: int = 1) -> str:
    """Create a classifier of five classes; return its id."""
    fields = [
        ("files", f"{kind}.png", image(kind, seed)) for kind in range(5) for seed in range(shots)
    ]
    labels = [("labels", "", b"abcde"[kind : kind + 1]) for kind in range(5) for _ in range(shots)]
    status, content = server.form("/api/classifiers", *fields, *labels)
    assert status == 201, content
    return str(content["id"])
