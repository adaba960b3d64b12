"""Attack, load and kill `metalearn serve`, and write benchmarks/serve.md.

python scripts/bench_serve.py [requests=10000] [kills=20]

1. Random and hostile requests: status codes, memory, and whether it still serves.
2. Time of a prediction with 8 clients, on a run and on a pretrained network.
3. kill -9 in the middle of writes: every example whose answer arrived must be there afterwards.
"""

import collections
import contextlib
import http.client
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pages import ROOT
from PIL import Image, ImageDraw

from metalearn.report.environment import describe_environment

_CLIENTS = 8
_RUN = ["experiment=demo", "train.steps=60", "val.episodes=20", "test.episodes=20"]
_TOKEN = "the token of this benchmark"


class Server:
    """`metalearn serve` in a process."""

    def __init__(self, *words: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "metalearn", "serve", "port=0", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "METALEARN_TOKEN": _TOKEN},
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
            connection.request(method, path, body, {"Authorization": f"Bearer {_TOKEN}", **names})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def form(self, path: str, *fields: tuple[str, str, bytes]) -> tuple[int, Any]:
        """Send a form of (name, file name, content); return status and parsed JSON."""
        status, text = self.send("POST", path, form(*fields), Content_Type=_FORM)
        return status, json.loads(text)


_FORM = "multipart/form-data; boundary=x"


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


def png(width: int, height: int, data: bytes) -> bytes:
    """Return a PNG with this header and compressed data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = zlib.crc32(name + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + name + data + check

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b""))
    )


def hostile_file(rng: random.Random) -> bytes:
    """Return the content of a file that is no small intact image."""
    good = image(rng.randrange(5), rng.randrange(50))
    zipped = io.BytesIO()
    kind = rng.randrange(9)
    if kind == 0:
        return good[: rng.randrange(len(good))]
    if kind == 1:  # changed bytes
        changed = bytearray(good)
        for _ in range(5):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if kind == 2:  # states billions of pixels
        return png(rng.choice([60_000, 2**31 - 1]), 60_000, bytes(1000))
    if kind == 3:  # unpacks to 1000 times its size, allowed and beyond
        side = rng.choice([1500, 9000])
        return png(side, side, bytes(side * side if side < 2000 else 10**6))
    if kind == 4:  # a text chunk that unpacks to 50 MB
        bomb = zlib.compress(bytes(50_000_000))
        data = b"key\0\0" + bomb
        chunk = len(data).to_bytes(4, "big") + b"zTXt" + data
        chunk += zlib.crc32(b"zTXt" + data).to_bytes(4, "big")
        return good[:33] + chunk + good[33:]
    if kind == 5:
        import zipfile

        with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("../../../etc/x.png", bytes(10_000_000))
        return zipped.getvalue()
    if kind == 6:
        return rng.choice([b"GIF89a", b"\xff\xd8\xff", b"BM", b"RIFF", b"II*\0"]) + rng.randbytes(
            200
        )
    if kind == 7:
        return b""
    return rng.randbytes(rng.randrange(2000))


_NAMES = (
    "../../../etc/passwd", "..\\..\\x", "/etc/passwd", "a\0b", "=cmd|' /C calc'!A0", "<script>",
    "x" * 5000, "\u202egnp.exe", "CON", ".", "..", " ", "%2e%2e%2f", "\ud800", "${jndi:ldap://x}",
    "'; DROP TABLE x; --", "{{7*7}}", "a\r\nSet-Cookie: x=1",
)  # fmt: skip


class Attack:
    """Random requests, most of them hostile."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server, self.rng = server, random.Random(seed)
        self.codes: collections.Counter[str] = collections.Counter()
        self.own = ""

    def once(self) -> None:
        """Send one request and count its status."""
        kinds = (self.raw, self.path, self.header, self.files, self.files, self.labels, self.body,
                 self.valid, self.valid)  # fmt: skip
        try:
            status = self.rng.choice(kinds)()
        except (OSError, http.client.HTTPException):
            status = "closed"
        self.codes[str(status)] += 1

    def raw(self) -> Any:
        """Send bytes that are no request, or a request that is not sent to its end."""
        rng = self.rng
        head = b"POST /api/classifiers HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Authorization: Bearer {_TOKEN}\r\nContent-Type: {_FORM}\r\n".encode()
        text = rng.choice([
            rng.randbytes(300), b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 100_000,
            head + b"Content-Length: 5000\r\n\r\n--x\r\n",
            head + b"Content-Length: 99999999999999999999\r\n\r\n",
            head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
            head + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
            head + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffff\r\nabc",
        ])  # fmt: skip
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=5) as stream:
            stream.sendall(text)
            stream.shutdown(socket.SHUT_WR)
            answer = stream.recv(100)
        return answer[9:12].decode("latin-1") or "closed"

    def path(self) -> Any:
        """Name what does not exist."""
        name = "".join(f"%{byte:02x}" for byte in self._name().encode("utf-8", "surrogatepass"))
        patterns = ["", "/{}", "/api/classifiers/{}", "/api/classifiers/{}/examples/x"]
        patterns += ["/api/classifiers/x/classes?label={}"]
        path = self.rng.choice(patterns).format(name[:30_000])
        method = self.rng.choice(["GET", "POST", "DELETE", "PUT", "PATCH", "OPTIONS", "HEAD", "X"])
        return self.server.send(method, path or "/")[0]

    def header(self) -> Any:
        """Claim another host, origin, token or size."""
        name, value = self.rng.choice([
            ("Host", "evil.example.org"), ("Origin", "https://evil.example.org"),
            ("Origin", "null"), ("Authorization", "Bearer wrong"), ("Authorization", ""),
            ("Sec-Fetch-Site", "cross-site"), ("Content-Length", "99999999999"),
            ("X-" + "y" * 60_000, "z"), ("Content-Type", "multipart/form-data"),
            ("Transfer-Encoding", "gzip"),
        ])  # fmt: skip
        return self.server.send("GET", "/api/classifiers", None, **{name.replace("-", "_"): value})[
            0
        ]

    def files(self) -> Any:
        """Upload hostile files."""
        count = self.rng.choice([1, 1, 2, 100])
        some = [hostile_file(self.rng) for _ in range(min(count, 2))]
        fields = [("files", f"{n}.png", some[n % len(some)]) for n in range(count)]
        if self.rng.random() < 0.5:
            return self.server.form(f"/api/classifiers/{self._own()}/predict", *fields)[0]
        path = f"/api/classifiers/{self._own()}/examples"
        return self.server.form(path, *fields, ("labels", "", b"a"))[0]

    def labels(self) -> Any:
        """Send hostile names."""
        name = self._name()
        fields = [("files", name.replace('"', ""), image(0, 1))]
        fields += [("labels", "", name.encode("utf-8", "surrogatepass"))] * self.rng.choice([1, 3])
        path = f"/api/classifiers/{self._own()}/examples"
        return self.server.send("POST", path, form(*fields), Content_Type=_FORM)[0]

    def body(self) -> Any:
        """Send a body of the wrong type, or of 40 MB without stating its size."""
        path = f"/api/classifiers/{self._own()}/predict"
        if self.rng.random() < 0.02:
            chunks = (bytes(2**20) for _ in range(40))
            return self.server.send("POST", path, chunks, Content_Type=_FORM)[0]
        bodies = [b"{}", b"[" * 10_000, b"--x", b"--x\r\n\r\n\r\n--x--", b"a=b"]
        bodies += [form(*[("f", "", b"")] * 3000), self.rng.randbytes(3000)]
        body = self.rng.choice(bodies)
        kind = self.rng.choice([_FORM, "application/json", "text/plain", "multipart/form-data; b"])
        return self.server.send("POST", path, body, Content_Type=kind)[0]

    def valid(self) -> Any:
        """Send a request that a page sends."""
        own, rng = self._own(), self.rng
        kind, path = rng.randrange(5), f"/api/classifiers/{own}"
        shape = rng.randrange(5)
        file = ("files", "x.png", image(shape, rng.randrange(1000)))
        if kind == 0:
            return self.server.form(
                f"{path}/examples", file, ("labels", "", b"abcde"[shape : shape + 1])
            )[0]
        if kind == 1:
            return self.server.send("GET", rng.choice([path, "/", "/health", "/openapi.json"]))[0]
        if kind == 2 and rng.random() < 0.1:
            return self.server.send("DELETE", path)[0]
        if kind == 3:
            return self.server.send("GET", f"{path}/download")[0]
        return self.server.form(f"{path}/predict", file)[0]

    def _own(self) -> str:
        """Return a classifier of five classes that exists, and is not large."""
        status, content = 404, b""
        if self.own:
            status, content = self.server.send("GET", f"/api/classifiers/{self.own}")
        if status != 200 or len(json.loads(content)["examples"]) > 60:
            self.server.send("DELETE", f"/api/classifiers/{self.own or 'x'}")
            self.own = new(self.server)
        return self.own

    def _name(self) -> str:
        return self.rng.choice(_NAMES)


def new(server: Server, shots: int = 1) -> str:
    """Create a classifier of five classes; return its id."""
    fields = [
        ("files", f"{kind}.png", image(kind, seed)) for kind in range(5) for seed in range(shots)
    ]
    labels = [("labels", "", b"abcde"[kind : kind + 1]) for kind in range(5) for _ in range(shots)]
    status, content = server.form("/api/classifiers", *fields, *labels)
    assert status == 201, content
    return str(content["id"])


def attack(words: list[str], count: int) -> list[str]:
    """Send hostile requests; return lines about them."""
    server = Server(*words)
    attacks = [Attack(server, seed) for seed in range(4)]
    memory, done, start = [], 0, time.time()
    while done < count:
        threads = [
            threading.Thread(target=lambda one=one: [one.once() for _ in range(50)])
            for one in attacks
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        done += 50 * len(attacks)
        memory.append(server.memory())
        if done % 1000 == 0:
            print(f"{done} requests, {memory[-1]:.0f} MiB, {time.time() - start:.0f} s", flush=True)
    codes = sum((one.codes for one in attacks), collections.Counter())
    own = new(server, 3)
    status, _ = server.form(f"/api/classifiers/{own}/predict", ("files", "x", image(0, 99)))
    errors = server.end()
    tenth = max(1, len(memory) // 10)
    first, last = (np.mean(part) for part in (memory[tenth : 2 * tenth], memory[-tenth:]))
    table = ", ".join(f"{code}: {number:,}" for code, number in sorted(codes.items()))
    tracebacks = errors.count("Traceback")
    return [
        f"{done:,} requests by {len(attacks)} clients in {time.time() - start:.0f} s: {table}.",
        f"Answers with status 500: {codes['500']}; tracebacks: {tracebacks}. Resident memory: "
        f"{first:.0f} MiB in the second tenth of the requests, {last:.0f} MiB in the last "
        f"({last - first:+.0f} MiB); largest {max(memory):.0f} MiB. Afterwards a prediction has "
        f"status {status}.",
    ]


def load(words: list[str], name: str, seconds: float) -> str:
    """Let clients predict; return a row of the table."""
    server = Server(*words)
    own, times, counter = new(server, 5), [], iter(range(10**9))
    path = f"/api/classifiers/{own}/predict"
    server.form(path, ("files", "x.png", image(0, 1)))

    def client(end: float) -> None:
        while time.time() < end:
            number = next(counter)
            start = time.perf_counter()
            status, _ = server.form(path, ("files", "x.png", image(number % 5, 1000 + number)))
            times.append(time.perf_counter() - start)
            assert status == 200

    rows = []
    for clients in (1, _CLIENTS):
        times.clear()
        end = time.time() + seconds
        threads = [threading.Thread(target=client, args=(end,)) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        p50, p99 = np.quantile(times, [0.5, 0.99]) * 1000
        rows.append(f"| {name} | {clients} | {len(times)} | {p50:.0f} ms | {p99:.0f} ms |")
    server.end()
    return "\n".join(rows)


def kill(words: list[str], count: int) -> str:
    """Kill the server in the middle of writes; return a line."""
    rng, own = random.Random(0), ""
    acknowledged: list[str] = []
    for turn in range(count):
        server = Server(*words)
        own = own or new(server)
        _check(server, own, acknowledged)
        killer = threading.Timer(rng.uniform(0.05, 1.0), server.end, (signal.SIGKILL,))
        killer.start()
        with contextlib.suppress(OSError, http.client.HTTPException):
            for number in range(10_000):
                file = ("files", "x.png", image(number % 5, turn * 10_000 + number))
                label = ("labels", "", b"abcde"[number % 5 : number % 5 + 1])
                status, content = server.form(f"/api/classifiers/{own}/examples", file, label)
                if status == 409:  # full: begin another
                    own, acknowledged = new(server), []
                    continue
                acknowledged.append(content["added"][0]["id"])
        killer.join()
    server = Server(*words)
    present = _check(server, own, acknowledged)
    errors = server.end()
    return (
        f"{count} times killed with -9 while a client adds examples: of {len(acknowledged):,} "
        f"acknowledged examples, {len(acknowledged):,} are there after the restarts ({present:,} "
        f"examples in all). Ctrl-C then prints: `{errors.strip()}`."
    )


def _check(server: Server, own: str, acknowledged: list[str]) -> int:
    _, content = server.send("GET", f"/api/classifiers/{own}")
    present = {one["id"] for one in json.loads(content)["examples"]}
    missing = set(acknowledged) - present
    assert not missing, f"{len(missing)} acknowledged examples are lost"
    return len(present)


@contextlib.contextmanager
def _words(folder: Path) -> Iterator[list[str]]:
    subprocess.run(
        [sys.executable, "-m", "metalearn", "train", *_RUN, f"hydra.run.dir={folder / 'run'}"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    yield [f"run={folder / 'run'}"]


def main() -> None:
    """Run all three parts and write the page."""
    options = dict(arg.partition("=")[::2] for arg in sys.argv[1:])
    requests, kills = int(options.get("requests", 10_000)), int(options.get("kills", 20))
    with tempfile.TemporaryDirectory() as name, _words(Path(name)) as words:

        def state(part: str) -> str:
            return f"state={name}/{part}"

        lines = attack([*words, state("attack")], requests)
        print("\n".join(lines), flush=True)
        rows = [
            load([*words, state("load")], "run (MAML, conv4)", 15),
            load([state("load"), "head=ridge"], "efficientnet_lite0", 30),
        ]
        print("\n".join(rows), flush=True)
        lines.append(kill([*words, state("kill")], kills))
        print(lines[-1], flush=True)
    hardware = describe_environment("cpu")
    text = "\n".join([
        "# metalearn serve under attack, load and kills", "",
        "`python scripts/bench_serve.py` (`make bench-serve`). Requests of the attack: invalid "
        "HTTP, truncated and chunked bodies, 40 MB, wrong types, hosts, origins and tokens, names "
        "that are paths, formulas or markup, PNG and zip bombs, corrupt images, and valid ones.",
        "", *(f"- {line}" for line in lines), "",
        "Time of a prediction of one new image, a new connection each:", "",
        "| network | clients | requests | p50 | p99 |", "|---|---|---|---|---|", *rows, "",
        f"Environment: {json.dumps(hardware)}", "",
    ])  # fmt: skip
    (ROOT / "benchmarks" / "serve.md").write_text(text)


if __name__ == "__main__":
    main()
