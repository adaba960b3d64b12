"""Downloads with a checksum, and one clear line where there is no network."""

import http.client
import socket
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path

from metalearn.system.errors import UserError

_REACH_SECONDS = 6.0


def fetch(url: str, folder: Path, md5: str | None) -> Path:
    """Downloads `url` into `folder` and checks it.

    Raises: UserError naming the address, the folder and the embedded data set, within ten seconds where the address
    cannot be reached, and where what came is not what the checksum says.
    """
    target = folder / url.rsplit("/", 1)[-1]
    part = target.with_suffix(".part")

    def download() -> None:
        from torchvision.datasets.utils import (
            download_url,
        )  # seconds to import: not before there is a network

        try:
            download_url(url, str(folder), part.name, md5)
            part.replace(target)  # under its name only once it is what the checksum says
        finally:
            part.unlink(missing_ok=True)

    with_network(url, folder, download)
    return target


def with_network(
    url: str, folder: Path, download: Callable[[], object], way_out: str | None = None
) -> None:
    """Runs a download of torchvision's after making sure that its address answers.

    Args: way_out: what the user can do without a network; None: what to do about a data set.
    Raises: UserError, see `fetch`.
    """
    way_out = (
        way_out
        or f"bring the files to {folder} by hand, or use dataset=glyphs, which needs no download"
    )
    problem = _unreachable(url)
    if problem:
        raise UserError(f"nothing in {folder} and {url} cannot be reached ({problem}); {way_out}")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        download()
    except (
        OSError,
        RuntimeError,
        http.client.HTTPException,
    ) as error:  # torchvision raises RuntimeError for a wrong checksum
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"download of {url} failed ({reason}); {way_out}") from None
    finally:
        socket.setdefaulttimeout(before)


def _unreachable(url: str) -> str | None:
    """Why the address does not answer, or None. In a thread, because a name look-up knows no time limit."""
    answer = [f"no answer in {_REACH_SECONDS:.0f} s"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, method="HEAD"), timeout=_REACH_SECONDS
            ):
                answer[0] = ""
        except (OSError, ValueError, http.client.HTTPException) as error:
            answer[0] = str(error) or type(error).__name__

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_REACH_SECONDS)
    return answer[0] or None
