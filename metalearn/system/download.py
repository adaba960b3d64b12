"""Download files with a checksum; report a missing network in one line."""

import http.client
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from metalearn.system.errors import UserError, first_line

_CONNECT_SECONDS = 6.0


def fetch(url: str, folder: Path, md5: str | None) -> Path:
    """Download `url` into `folder`, which is created, and verify its checksum, if there is one.

    Raise UserError, which names the address, the folder and the built-in dataset, if the address
    cannot be reached (within ten seconds) or the checksum differs.
    """
    target = folder / url.rsplit("/", 1)[-1]
    part = target.with_suffix(".part")

    def download() -> None:
        # The import takes seconds, so it waits until the address has answered.
        from torchvision.datasets.utils import download_url

        try:
            download_url(url, str(folder), part.name, md5)
            part.replace(target)  # only after the checksum was verified
        finally:
            part.unlink(missing_ok=True)

    run_download(url, folder, download)
    return target


def run_download(
    url: str, folder: Path, download: Callable[[], object], way_out: str | None = None
) -> None:
    """Run a torchvision download into `folder`, which is created, if its address answers.

    Raise UserError if it does not answer or the download fails, with `way_out`: what the user can
    do without a network, by default the advice about datasets.
    """
    by_hand = f"bring the files to {folder} by hand, or use dataset=glyphs, which needs no download"
    way_out = way_out or by_hand
    if problem := connection_error(url):
        raise UserError(f"{url} cannot be reached ({problem}), no copy in {folder}; {way_out}")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        download()
    # torchvision raises RuntimeError for a wrong checksum.
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise UserError(f"download of {url} failed ({first_line(error)}); {way_out}") from None
    finally:
        socket.setdefaulttimeout(before)


def connection_error(
    url: str, any_answer: bool = False, seconds: float = _CONNECT_SECONDS
) -> str | None:
    """Return why an address does not answer within some seconds, or None.

    With `any_answer`, a refusal of this page, as by a server without one, is an answer.
    """
    answer = [f"no answer in {seconds:.0f} s"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, method="HEAD"), timeout=seconds
            ):
                answer[0] = ""
        except (OSError, ValueError, http.client.HTTPException) as error:
            is_refusal = isinstance(error, urllib.error.HTTPError) and error.code < 500
            is_refusal = is_refusal or isinstance(getattr(error, "reason", None), ssl.SSLError)
            answer[0] = "" if any_answer and is_refusal else str(error) or type(error).__name__

    # In a thread, because the look-up of a name has no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] or None
