"""Serve a store of classifiers over HTTP: a page, and the same operations as an interface."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Annotated, Any

from fastapi import (
    APIRouter,
    Depends,
    FastAPI,
    File,
    Form,
    HTTPException,
    Query,
    Request,
    UploadFile,
)
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from metalearn import __version__
from metalearn.predict import report
from metalearn.predict.store import ClassifierStore
from metalearn.predict.uploads import Limits, Refused, Upload
from metalearn.system.errors import first_line

_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
#: Address of everything that reads or changes classifiers.
_API = "/api"


class _Document(BaseModel):
    """The JSON of a request with texts."""

    text: str | list[str] = []
    labels: str | list[str] = []
    name: str = "classifier"


class _Guard:
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
            return _refused(421, "this host is not served; allow it with hosts=")
        origin = headers.get("origin")
        is_foreign = origin is not None and re.sub("^https?://", "", origin) != host
        is_api = scope["path"].startswith(_API)
        if is_foreign or (is_api and headers.get("sec-fetch-site") in ("cross-site", "same-site")):
            return _refused(403, "requests of other sites are not served")
        if self._token and is_api:
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self._token.encode()):
                return _refused(
                    401, "the token is missing or wrong", {"WWW-Authenticate": "Bearer"}
                )
        length = headers.get("content-length", "0")
        if not re.fullmatch("[0-9]{1,12}", length) or int(length) > self._limits.body:
            return _refused(413, f"a request has at most {self._limits.body:,} bytes")
        if is_api and self._waiting > self._limits.waiting:
            return _refused(503, "too many requests wait; try again", {"Retry-After": "1"})
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


def _refused(status: int, reason: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": reason}, status, headers)


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _page(name: str) -> HTMLResponse:
    """Return a page of this folder; only its own script and style run."""
    text = (resources.files("metalearn.predict") / name).read_text()
    rules = ["default-src 'none'", "connect-src 'self'", "img-src 'self' blob: data:"]
    rules += ["base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]
    for tag in ("script", "style"):
        for content in re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL):
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            rules.append(f"{tag}-src 'sha256-{digest}'")
    return HTMLResponse(text, headers={"Content-Security-Policy": "; ".join(rules)})


def create_app(store: ClassifierStore, token: str = "", hosts: frozenset[str] = frozenset()) -> Any:
    """Return the server as an ASGI application.

    Args:
        store: The classifiers; used in one thread, so the order of changes is that of requests.
        token: What requests must give as a bearer token; "" for none.
        hosts: Names in the Host header that are served, in addition to addresses and localhost.
    """
    limits = store.limits
    thread = ThreadPoolExecutor(1)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        thread.shutdown(cancel_futures=True)

    async def run(function: Callable[..., Any], *args: Any) -> Any:
        """Call a method of the store in its thread."""
        return await asyncio.get_running_loop().run_in_executor(thread, function, *args)

    app = FastAPI(
        title="metalearn serve", version=__version__, docs_url=None, redoc_url=None,
        lifespan=lifespan, description="Few-shot classifiers that learn online.",
    )  # fmt: skip

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return _refused(error.status, str(error))

    @app.exception_handler(OSError)
    async def no_space(request: Request, error: OSError) -> Response:
        return _refused(507, f"the state cannot be read or saved ({error.strerror})")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return _page("page.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return _page("docs.html")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Say that the server runs."""
        return {"status": "ok", "version": __version__}

    api = APIRouter(prefix=_API, dependencies=[Depends(HTTPBearer(auto_error=False))])
    files_type = Annotated[list[UploadFile], File(description="Images.")]
    labels_type = Annotated[list[str], Form(description="A class for each file, or one for all.")]

    async def document(request: Request) -> _Document:
        if not request.headers.get("content-type", "").startswith("application/json"):
            return _Document()
        try:
            return _Document.model_validate_json(await request.body())
        except ValidationError as error:
            reason = first_line(ValueError(error.errors()[0]["msg"]))
            raise Refused(422, f'the JSON is not {{"text": …}} ({reason})') from None

    json_type = Annotated[_Document, Depends(document)]

    def uploads(files: list[UploadFile], json: _Document) -> list[Upload]:
        texts = _listed(json.text)
        if len(files) + len(texts) > limits.files:
            raise Refused(413, f"a request has at most {limits.files} files or texts")
        sent = [Upload((one.filename or "image")[: limits.name], one.file) for one in files]
        return sent + [Upload(f"text {number}", one) for number, one in enumerate(texts, 1)]

    @api.get("/settings")
    async def settings() -> dict[str, Any]:
        """Return what the page must know: kind of examples, limits, pen of a run on handwriting."""
        network = store.network
        return {"kind": network.kind, "pen": network.pen, "way": network.way,
                "limits": vars(limits)}  # fmt: skip

    @api.get("/classifiers")
    async def list_classifiers() -> list[dict[str, Any]]:
        """List all classifiers."""
        return await run(store.briefs)  # type: ignore[no-any-return]

    @api.post("/classifiers", status_code=201)
    async def create(
        json: json_type,
        name: Annotated[str, Form(description="Its name.")] = "classifier",
        files: files_type = [],  # noqa: B006
        labels: labels_type = [],  # noqa: B006
    ) -> dict[str, Any]:
        """Create a classifier, with examples or without; by a form or by JSON (text, labels, name).

        With a network of texts, the JSON has {"text": "…"} or a list, in the place of files.
        """
        own = name if name != "classifier" else json.name
        labels = labels or _listed(json.labels)
        return await run(store.create, own, uploads(files, json), labels)  # type: ignore[no-any-return]

    @api.get("/classifiers/{id}")
    async def describe(id: str) -> dict[str, Any]:
        """Return a classifier's examples, and how many labels to expect to be right."""
        return await run(store.describe, id)  # type: ignore[no-any-return]

    @api.delete("/classifiers/{id}", status_code=204)
    async def delete(id: str) -> None:
        """Delete a classifier."""
        await run(store.delete, id)

    @api.post("/classifiers/{id}/examples", status_code=201)
    async def add(
        id: str,
        json: json_type,
        files: files_type = [],  # noqa: B006
        labels: labels_type = [],  # noqa: B006
    ) -> dict[str, Any]:
        """Add examples, also of new classes. They are on disk when the answer arrives.

        Texts are JSON: {"text": ["…", "…"], "labels": "a"}.
        """
        labels = labels or _listed(json.labels)
        return await run(store.add, id, uploads(files, json), labels)  # type: ignore[no-any-return]

    @api.delete("/classifiers/{id}/examples/{example}")
    async def remove(id: str, example: str) -> dict[str, Any]:
        """Remove an example."""
        return await run(store.remove, id, "id", example)  # type: ignore[no-any-return]

    @api.delete("/classifiers/{id}/classes")
    async def forget(id: str, label: Annotated[str, Query()]) -> dict[str, Any]:
        """Remove a class with its examples."""
        return await run(store.remove, id, "label", label)  # type: ignore[no-any-return]

    @api.post("/classifiers/{id}/predict", response_model=None)
    async def predict(
        id: str,
        json: json_type,
        files: files_type = [],  # noqa: B006
        table: Annotated[bool, Query(description="CSV.")] = False,
    ) -> Response:
        """Label images, or texts as JSON: {"text": "…"} or {"text": ["…", "…"]}.

        Returns the content of predictions.json, or of predictions.csv.
        """
        result = await run(store.predict, id, uploads(files, json))
        if table:
            return PlainTextResponse(report.table(result), media_type="text/csv")
        return JSONResponse(result)

    @api.get("/classifiers/{id}/download")
    async def download(id: str) -> Response:
        """Return a zip; unzipped, it is a folder for `metalearn predict classifier=`."""
        headers = {"Content-Disposition": 'attachment; filename="classifier.zip"'}
        return Response(await run(store.archive, id), 200, headers, "application/zip")

    app.include_router(api)
    return _Guard(app, token, hosts, limits)
