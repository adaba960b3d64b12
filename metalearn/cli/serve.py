"""Serve a page and an HTTP interface to label images or texts, with classes that change online."""

import contextlib
import ipaddress
import os
import socket
from pathlib import Path
from typing import Any

from metalearn.cli import predict
from metalearn.system.errors import UserError, writing

HELP = """metalearn serve [key=value …]

Serves a page on which you drop a few images of each class, drop others and see their labels at
once; a wrong label is corrected with a click. With a run that was trained on handwriting, you draw;
with a network of texts, you type or paste them. The same operations are an HTTP interface (/docs).
Ctrl-C ends it.

  metalearn serve                            on a pretrained network, http://127.0.0.1:8000
  metalearn serve backbone=text_encoder      texts instead of images
  metalearn serve run=<folder>               on a trained run
  metalearn serve classifier=<folder>        begin with a classifier that metalearn predict saved
  METALEARN_TOKEN=… metalearn serve host=0.0.0.0 hosts=lab.example.org

  backbone= run= head= error_rate=           as in metalearn predict
  classifier=   a saved classifier, instead of these
  port=8000     0: any free one
  host=127.0.0.1    another address requires a token of at least 16 characters
  token_file=   file with the token (or in the environment: METALEARN_TOKEN); never on the command
                line, which other users can see
  hosts=        names under which browsers reach the server (a,b), in addition to addresses
  state=        folder that keeps classifiers and their examples (default: outputs/serve)

An answer to a change is sent when the change is on disk. Requires the extra `serve`.
"""
#: What shell completion offers.
TAKES: tuple[str, ...] = (
    *predict.CLASSIFIER_TAKES, "host=127.0.0.1", "port=8000", "hosts=", "token_file={folder}",
    "state={folder}",
)  # fmt: skip

_TOKEN = "METALEARN_TOKEN"
_TOKEN_LENGTH = 16


def main(args: list[str]) -> int:
    """Run the command. Return the exit code."""
    words = list(args)
    given = predict.take_settings("serve", words, TAKES)
    if words:
        raise UserError(f"{words[0]}: serve takes key=value only; see metalearn serve --help")
    for key in ("backbone", "head"):
        if key in given and "classifier" in given:
            raise UserError(f"{key}={given[key]}: applies without classifier=")
    host, token = given.get("host", "127.0.0.1"), _token(given.get("token_file"))
    if not _is_local(host) and not token:
        raise UserError(
            f"host={host}: other computers can reach it, so a token is required; set {_TOKEN} or "
            "token_file="
        )
    if token and len(token) < _TOKEN_LENGTH:
        raise UserError(f"the token has {len(token)} characters; at least {_TOKEN_LENGTH}")
    with contextlib.closing(_listen(host, given.get("port", "8000"))) as listener:
        serve(given, listener, token)
    return 0


def serve(given: dict[str, str], listener: socket.socket, token: str) -> None:
    """Serve until a signal ends it; raise UserError for a mistake in the arguments."""
    try:
        import uvicorn

        from metalearn.predict.server import create_app
    except ImportError as error:
        raise UserError(
            f"serve requires {error.name}; install the extra: metalearn-lab[serve]"
        ) from None
    from metalearn.predict.store import ClassifierStore
    from metalearn.predict.uploads import Limits
    from metalearn.system.lock import alone_in

    folder = Path(given.get("state", "outputs/serve")).expanduser()
    with writing(f"state={folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        try:
            store = ClassifierStore(folder, predict.open_classifier(given), Limits())
        except ValueError as error:
            raise UserError(f"serve: {error}") from None
        hosts = frozenset(name.strip().lower() for name in given.get("hosts", "").split(","))
        app = create_app(store, token, hosts - {""})
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{port}  {len(store)} classifiers in {store.folder}", flush=True)
        settings: dict[str, Any] = {"log_level": "warning", "server_header": False}
        settings |= {"limit_concurrency": 512, "timeout_graceful_shutdown": 5}
        uvicorn.Server(uvicorn.Config(app, **settings)).run([listener])


def _token(file: str | None) -> str:
    """Return the token of the file or the environment, or ""."""
    if file is None:
        return os.environ.get(_TOKEN, "").strip()
    from metalearn.system.reading import read_text

    if not (token := read_text(Path(file).expanduser(), 4096).strip()):
        raise UserError(f"token_file={file}: the file is empty")
    return token


def _is_local(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _listen(host: str, port: str) -> socket.socket:
    """Return a socket that listens."""
    if not port.isdecimal() or int(port) > 65535:
        raise UserError(f"port={port}: should be a number from 0 to 65535")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, int(port)), family=family)
    except OSError as error:
        raise UserError(
            f"host={host} port={port}: cannot listen there ({error.strerror}); choose another port="
        ) from None
