"""Random requests to `metalearn serve`, most of them hostile."""

import collections
import http.client
import io
import json
import random
import socket
import zipfile
import zlib
from typing import Any

from served import FORM, TOKEN, Server, form, image, new


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
        head += f"Authorization: Bearer {TOKEN}\r\nContent-Type: {FORM}\r\n".encode()
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
        return self.server.send("POST", path, form(*fields), Content_Type=FORM)[0]

    def body(self) -> Any:
        """Send a body of the wrong type, or of 40 MB without stating its size."""
        path = f"/api/classifiers/{self._own()}/predict"
        if self.rng.random() < 0.02:
            chunks = (bytes(2**20) for _ in range(40))
            return self.server.send("POST", path, chunks, Content_Type=FORM)[0]
        bodies = [b"{}", b"[" * 10_000, b"--x", b"--x\r\n\r\n\r\n--x--", b"a=b"]
        bodies += [form(*[("f", "", b"")] * 3000), self.rng.randbytes(3000)]
        body = self.rng.choice(bodies)
        kind = self.rng.choice([FORM, "application/json", "text/plain", "multipart/form-data; b"])
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
