"""Serve a store of classifiers over HTTP: a page, and the same operations as an interface."""

import asyncio
import base64
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, File, Form, Query, Request, UploadFile
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ValidationError

from metalearn import __version__
from metalearn.predict import report
from metalearn.predict.guard import API, Guard, refused
from metalearn.predict.store import ClassifierStore
from metalearn.predict.uploads import Refused, Upload
from metalearn.system.errors import first_line


class _Document(BaseModel):
    """The JSON of a request with texts."""

    text: str | list[str] = []
    labels: str | list[str] = []
    name: str = "classifier"


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

    The store is used in one thread, so the order of changes is that of requests. `token` is what
    requests must give as a bearer token; `hosts` are served in addition to addresses and localhost.
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
    async def on_refused(request: Request, error: Refused) -> Response:
        return refused(error.status, str(error))

    @app.exception_handler(OSError)
    async def no_space(request: Request, error: OSError) -> Response:
        return refused(507, f"the state cannot be read or saved ({error.strerror})")

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

    api = APIRouter(prefix=API, dependencies=[Depends(HTTPBearer(auto_error=False))])
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
    return Guard(app, token, hosts, limits)
