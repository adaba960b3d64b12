"""Refuse requests before they are read: those of other sites, without the token, too large."""

import asyncio
import contextlib
import hmac
import ipaddress
import re

from fastapi import HTTPException
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from metalearn.predict.uploads import Limits

_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
#: Address of everything that reads or changes classifiers.
API = "/api"


class Guard:
    """Refuse requests before they are read: wrong host, origin, token, size, or too many at once.

    A page of another site cannot use the server, although the browser reaches it: the browser
    states the page's origin, and a name that an attacker lets point here (DNS rebinding) is no
    allowed host.
    """

    def __init__(self, app: ASGIApp, token: str, hosts: frozenset[str], limits: Limits) -> None:
        self._app, self._token, self._hosts, self._limits = app, token, hosts, limits
        self._waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        self._waiting += 1
        try:
            if (refusal := self._refusal(scope)) is not None:
                await refusal(scope, receive, send_with_headers)
            else:
                await self._app(scope, self._limited(receive), send_with_headers)
        finally:
            self._waiting -= 1

    def _refusal(self, scope: Scope) -> Response | None:
        """Return the answer to a request that is not served."""
        headers: dict[str, str] = {}
        for key, value in scope["headers"]:
            headers.setdefault(key.decode("latin-1"), value.decode("latin-1"))
        host = headers.get("host", "")
        if not self._is_allowed(host):
            return refused(421, "this host is not served; allow it with hosts=")
        origin = headers.get("origin")
        is_foreign = origin is not None and re.sub("^https?://", "", origin) != host
        is_api = scope["path"].startswith(API)
        if is_foreign or (is_api and headers.get("sec-fetch-site") in ("cross-site", "same-site")):
            return refused(403, "requests of other sites are not served")
        if self._token and is_api:
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self._token.encode()):
                return refused(401, "the token is missing or wrong", {"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if not re.fullmatch("[0-9]{1,12}", length) or int(length) > self._limits.body:
            return refused(413, f"a request has at most {self._limits.body:,} bytes")
        if is_api and self._waiting > self._limits.waiting:
            return refused(503, "too many requests wait; try again", {"Retry-After": "1"})
        return None

    def _is_allowed(self, host: str) -> bool:
        """Return True for an address or an allowed name: no foreign name can be an address."""
        name = re.sub(r":\d*$", "", host).lower()
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(name.removeprefix("[").removesuffix("]")))
        return name == "localhost" or name in self._hosts

    def _limited(self, receive: Receive) -> Receive:
        """Limit the size of a body and the time in which it arrives."""
        size, is_complete = 0, False
        end = asyncio.get_running_loop().time() + self._limits.seconds

        async def limited() -> Message:
            nonlocal size, is_complete
            if is_complete:
                return await receive()
            rest = end - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, rest))
            except asyncio.TimeoutError:
                raise HTTPException(408, "the request did not arrive in time") from None
            size += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if size > self._limits.body:
                raise HTTPException(413, f"a request has at most {self._limits.body:,} bytes")
            return message

        return limited


def refused(status: int, reason: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return the answer to a request that is not served."""
    return JSONResponse({"detail": reason}, status, headers)
