"""`metalearn serve`: the HTTP interface, its limits, and the command."""

import csv
import http.client
import io
import json
import os
import re
import signal
import socket
import sys
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from fastapi.testclient import TestClient
from omegaconf import OmegaConf
from PIL import Image

from metalearn import FewShotClassifier
from metalearn.cli import _arguments
from metalearn.cli import main as main_module
from metalearn.cli import serve as command
from metalearn.cli._completion import candidates
from metalearn.config import composition
from metalearn.config.checking import check_config
from metalearn.predict import report, saved
from metalearn.predict.inputs import Item
from metalearn.predict.server import create_app
from metalearn.predict.store import ClassifierStore
from metalearn.predict.uploads import Limits
from metalearn.report.progress import SILENT
from metalearn.run import loop
from metalearn.run.build import build
from metalearn.system.errors import UserError
from tests.fixtures import SMALL

_HOSTILE = '=1+<img src=x onerror="alert(1)">'
_TOKEN = "a token of sufficient length"


def train(folder, cache_dir, *overrides, base=SMALL):
    config = composition.compose_config([*base, f"cache_dir={cache_dir}", *overrides])
    folder.mkdir()
    loop.fit(build(check_config(config)), SILENT, folder)
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, cache_dir):
    return train(tmp_path_factory.mktemp("runs") / "run", cache_dir, "algo=protonet")


def image(kind=0, number=0, size=24, format="PNG"):
    """Return a file with a bar that is upright, level, or neither."""
    array = np.random.default_rng([number, kind]).integers(200, 256, (size, size), dtype=np.uint8)
    middle = slice(size // 3 + number % 3, size // 2 + number % 3)
    array[(middle, slice(None)) if kind == 0 else (slice(None), middle)] = 0
    if kind == 2:
        array[np.eye(size, dtype=bool)] = 0
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format)
    return buffer.getvalue()


def bomb(size):
    """Return a small PNG whose header states size x size pixels."""

    def chunk(name, data):
        return (
            len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
        )

    header = size.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    rows = zlib.compress(bytes(10_000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


@pytest.fixture
def serve(tmp_path, run_folder):
    """Return a function that makes a client; several use the same state."""

    def make(limits=None, token="", hosts=(), settings=None, state=tmp_path / "state"):
        classifier = settings or FewShotClassifier(run=run_folder, head="ridge")
        store = ClassifierStore(state, classifier, limits or Limits())
        app = create_app(store, token, frozenset(hosts))
        client = TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)
        client.__enter__()
        clients.append(client)
        return client

    clients: list[TestClient] = []
    yield make
    for client in clients:
        client.__exit__()


def files(*images):
    return [("files", (f"{number}.png", data)) for number, data in enumerate(images)]


def create(client, *labels, shots=3):
    """Create a classifier with some examples of each label; return its id."""
    images = [image(kind, number) for kind in range(len(labels)) for number in range(shots)]
    data = {"name": "mine", "labels": [label for label in labels for _ in range(shots)]}
    answer = client.post("/api/classifiers", data=data, files=files(*images))
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def predict(client, own, *images):
    answer = client.post(f"/api/classifiers/{own}/predict", files=files(*images))
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_labels_equal_those_of_the_classifier_and_the_command(serve, run_folder, tmp_path):
    client = serve()
    own = create(client, "level", "upright")
    queries = [image(kind, number) for kind in (0, 1) for number in range(10, 14)]
    result = predict(client, own, *queries, b"no image")
    assert [row["label"] for row in result["predictions"]] == [
        *["level"] * 4,
        *["upright"] * 4,
        None,
    ]
    assert "PNG" in result["predictions"][-1]["error"]

    opened = [Image.open(io.BytesIO(image(kind, number))) for kind in (0, 1) for number in range(3)]
    classifier = FewShotClassifier(run=run_folder, head="ridge")
    classifier.fit(opened, [*["level"] * 3, *["upright"] * 3])
    labels = classifier.label([Image.open(io.BytesIO(one)) for one in queries])
    names = [f"{number}.png" for number in range(8)]
    items = [Item(name, Path(name)) for name in names]
    expected = json.loads(json.dumps(report.content(classifier, items, [*labels], {})))
    assert result["predictions"][:8] == expected["predictions"]

    answer = client.get(f"/api/classifiers/{own}/download")
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        archive.extractall(tmp_path / "unzipped")
    (tmp_path / "new").mkdir()
    for name, data in zip(names, queries, strict=True):
        (tmp_path / "new" / name).write_bytes(data)
    words = [f"classifier={tmp_path}/unzipped", f"query={tmp_path}/new", f"out={tmp_path}/out"]
    assert main_module._dispatch(["predict", *words]) == 0
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())["predictions"]
    assert [{**row, "file": Path(row["file"]).name} for row in rows] == expected["predictions"]


def test_classes_change_online(serve):
    client = serve()
    own = client.post("/api/classifiers", data={"name": " cells "}).json()["id"]
    assert client.get("/api/classifiers").json() == [
        {"id": own, "name": "cells", "classes": {},
         "missing": "at least 2 classes are required; there are 0"}
    ]  # fmt: skip
    path = f"/api/classifiers/{own}"
    not_yet = client.post(f"{path}/predict", files=files(image()))
    assert not_yet.status_code == 409 and "2 classes" in not_yet.json()["detail"]
    assert client.get(f"{path}/download").status_code == 409
    for kind, label in enumerate(["a", "b", "c"]):
        images = [image(kind, number) for number in range(4)]
        answer = client.post(f"{path}/examples", files=files(*images), data={"labels": label})
        assert answer.status_code == 201 and answer.json()["classes"][label] == 4
        assert [one["label"] for one in answer.json()["added"]] == [label] * 4
    content = client.get(path).json()
    assert len(content["examples"]) == 12 and content["missing"] == ""
    assert content["summary"][0].startswith("Expect")
    assert all(one["thumbnail"] and one["file"].endswith(".png") for one in content["examples"])
    assert predict(client, own, image(2, 9))["predictions"][0]["label"] == "c"

    # A correction: the image becomes an example of another class, and is then recognised.
    strange = image(2, 9, size=40)
    for _ in range(3):
        client.post(f"{path}/examples", files=files(strange), data={"labels": "new"})
    assert predict(client, own, strange)["predictions"][0]["label"] == "new"
    first = content["examples"][0]["id"]
    assert client.delete(f"{path}/examples/{first}").json()["classes"]["a"] == 3
    assert client.delete(f"{path}/examples/{first}").status_code == 404
    answer = client.delete(f"{path}/classes", params={"label": "new"})
    assert answer.json()["classes"] == {"a": 3, "b": 4, "c": 4}
    assert client.delete(f"{path}/classes", params={"label": "new"}).status_code == 404
    assert predict(client, own, strange)["predictions"][0]["label"] != "new"
    assert client.delete(path).status_code == 204
    assert client.get(path).status_code == 404 and client.get("/api/classifiers").json() == []


def test_state_survives_a_restart(serve, tmp_path):
    client = serve()
    own, other = create(client, "a", _HOSTILE), create(client, "x", "y")
    before = predict(client, own, image(1, 20))
    client.delete(f"/api/classifiers/{other}")
    (folder,) = (tmp_path / "state").iterdir()
    (folder / "abandoned").mkdir()
    again = serve()
    assert predict(again, own, image(1, 20)) == before
    assert [one["id"] for one in again.get("/api/classifiers").json()] == [own]
    assert [path.name for path in folder.iterdir()] == [own]
    (folder / own / "examples.json").write_text("{}")
    with pytest.raises(Exception, match="is not a classifier"):
        serve()


def test_an_example_that_is_not_on_disk_is_not_acknowledged(serve, monkeypatch):
    client = serve()
    own = create(client, "a", "b")
    written = saved.write

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved, "write", full)
    answer = client.post(
        f"/api/classifiers/{own}/examples", files=files(image()), data={"labels": "a"}
    )
    assert answer.status_code == 507 and "No space left" in answer.json()["detail"]
    monkeypatch.setattr(saved, "write", written)
    for one in (client, serve()):
        assert one.get(f"/api/classifiers/{own}").json()["classes"] == {"a": 3, "b": 3}


def test_a_saved_classifier_is_served_once(serve, run_folder, tmp_path):
    classifier = FewShotClassifier(run=run_folder, head="prototype")
    images = [Image.open(io.BytesIO(image(kind, n))) for kind in (0, 1) for n in range(3)]
    classifier.fit(images, [1, 1, 1, 2, 2, 2]).save(tmp_path / "classifier")
    for _ in range(2):
        client = serve(settings=FewShotClassifier.load(tmp_path / "classifier"))
        (one,) = client.get("/api/classifiers").json()
        assert one["classes"] == {"1": 3, "2": 3}
        content = client.get(f"/api/classifiers/{one['id']}").json()
        assert content["head"] == "prototype" and len(content["examples"]) == 6


def test_a_run_with_a_fixed_number_of_classes_says_how_many(serve, tmp_path, cache_dir):
    run = train(tmp_path / "maml", cache_dir, "algo=maml", "episode.way=3")
    client = serve(settings=FewShotClassifier(run=run))
    settings = client.get("/api/settings").json()
    assert settings["way"] == 3 and settings["pen"] == 0.075
    own, other = create(client, "a", "b", shots=1), create(client, "a", "b", "c", shots=1)
    answer = client.post(f"/api/classifiers/{own}/predict", files=files(image()))
    assert answer.status_code == 409 and "exactly 3 classes; there are 2" in answer.text
    # Two classifiers share the network: neither changes what the other predicts.
    before = predict(client, other, image(1, 5))
    client.post(f"/api/classifiers/{own}/examples", files=files(image(2)), data={"labels": "z"})
    assert predict(client, own, image(1, 5))["predictions"][0]["label"] in "abz"
    assert predict(client, other, image(1, 5)) == before


_SMALL_LIMITS = Limits(
    body=20_000, files=8, pixels=5000, all_pixels=6000, classifiers=2, examples=7, classes=3,
    name=20,
)  # fmt: skip


@pytest.mark.parametrize(
    ("status", "images", "labels", "message"),
    [
        (201, [image()], ["a"], ""),
        (201, [image(format="JPEG"), image(format="BMP"), image(format="WEBP")], ["a"], ""),
        (422, [b"PK\x03\x04 no image"], ["a"], "0.png is not a readable image"),
        (422, [image(), image()[:90]], ["a"], "1.png is not a readable image"),
        (422, [image(format="PCX")], ["a"], "not one of PNG"),
        (422, [b""], ["a"], "not a readable image"),
        (422, [image()], ["a", "b"], "1 files have 2 labels"),
        (422, [image()], [], ""),
        (422, [], ["a"], ""),
        (422, [image()], [" "], "1 to 20 printable characters"),
        (422, [image()], ["x" * 21], "1 to 20 printable characters"),
        (422, [image()], ["a\nb"], "1 to 20 printable characters"),
        (422, [image()], ["a\0"], "1 to 20 printable characters"),
        (413, [bomb(60_000)], ["a"], "too many pixels"),
        (413, [image(size=60), image(size=60)], ["a"], "too many pixels"),
        (413, [image()] * 9, ["a"], "at most 8 files"),
        (413, [bytes(30_000)], ["a"], "at most 20,000 bytes"),
        (409, [image(), image()], ["a"], "at most 7 examples"),
        (409, [image(), image()], ["c", "d"], "at most"),
    ],
)
def test_status_of_examples(serve, status, images, labels, message):
    client = serve(_SMALL_LIMITS)
    own = create(client, "a", "b", shots=2 if status != 409 else 3)
    path = f"/api/classifiers/{own}/examples"
    answer = client.post(path, files=files(*images), data={"labels": labels})
    assert answer.status_code == status, answer.text
    assert message in answer.text and "/tmp" not in answer.text
    kept = len(client.get(f"/api/classifiers/{own}").json()["examples"])
    assert kept == (4 + len(images) if status == 201 else 6 if status == 409 else 4)


def test_other_limits(serve):
    client = serve(_SMALL_LIMITS)
    own = create(client, "a", "b")
    create(client, "a", "b")
    answer = client.post("/api/classifiers")
    assert answer.status_code == 409 and "delete one" in answer.text
    path = f"/api/classifiers/{own}/predict"
    assert client.post(path, files=files(bomb(60_000))).status_code == 413
    assert client.post(path, files=files(bomb(60))).status_code == 200  # a corrupt image
    body = (b"x" * 1000 for _ in range(100))  # no content-length
    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert client.post(path, content=body, headers=headers).status_code == 413
    for wrong in ("-1", "x", "9" * 5000):
        assert client.get("/health", headers={"content-length": wrong}).status_code == 413
    assert client.post(path, json={"files": 1}).status_code == 422
    for other in ("..", "../../etc/passwd", "%2e%2e%2f%2e%2e", "x" * 10_000, "a%00b"):
        assert client.get(f"/api/classifiers/{other}").status_code == 404
        assert client.delete(f"/api/classifiers/{other}").status_code == 404
    assert client.put(path).status_code == 405
    assert client.get("/health").json()["status"] == "ok"


def test_names_of_a_request_are_never_markup_formula_or_path(serve, tmp_path):
    client = serve()
    own = create(client, "a", _HOSTILE)
    name = "=../../../<b>.png"
    path = f"/api/classifiers/{own}"
    client.post(f"{path}/examples", files=[("files", (name, image()))], data={"labels": "a"})
    answer = client.post(f"{path}/predict?table=true", files=[("files", (name, image(1, 9)))])
    assert answer.headers["content-type"].startswith("text/csv")
    (row,) = csv.DictReader(io.StringIO(answer.text))
    assert row["file"] == f"'{name}" and row["label"] == f"'{_HOSTILE}"
    states = [one.relative_to(tmp_path / "state").parts for one in tmp_path.rglob("*")
              if "state" in one.parts and one.is_file()]  # fmt: skip
    assert all(re.fullmatch(r"[\w.-]+", part) for parts in states for part in parts)
    page = client.get("/").text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", page)


def test_slow_requests_get_408_and_too_many_503(serve):
    app = serve(Limits(waiting=2, seconds=1.0)).app
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    head = b"POST /api/classifiers HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n"
    head += b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"

    def get(path):
        connection = http.client.HTTPConnection(address[0], address[1], timeout=20)
        connection.request("GET", path)
        return connection.getresponse()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        address: tuple[str, int] = listener.getsockname()
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            slow = [socket.create_connection(address, timeout=20) for _ in range(2)]
            for one in slow:
                one.sendall(head)
            while (answer := get("/api/classifiers")).status != 503:
                pass
            assert answer.headers["retry-after"] == "1" and get("/health").status == 200
            for one in slow:
                assert one.recv(1000).startswith(b"HTTP/1.1 408")
                one.close()
            assert get("/api/classifiers").status == 200
        finally:
            server.should_exit = True
            thread.join()


def test_hosts_origins_and_tokens(serve):
    client = serve(token=_TOKEN, hosts=["lab.example.org"])
    right = {"Authorization": f"Bearer {_TOKEN}"}

    def status(path="/api/settings", **headers):
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return client.get(path, headers={**right, **names}).status_code

    for host in ("127.0.0.1:8000", "localhost:1", "[::1]:80", "192.168.0.7", "LAB.example.org"):
        assert status(host=host) == 200
    for host in ("evil.example.org", "localhost.evil.org", "", "127.0.0.1.evil.org", "[::1].x"):
        assert status(host=host) == status("/", host=host) == 421
    assert status(host="localhost:5", origin="http://localhost:5") == 200
    for origin in ("http://evil.org", "null", "http://localhost:6", "http://localhost:5.evil.org"):
        assert status(host="localhost:5", origin=origin) == 403
    assert status(sec_fetch_site="cross-site") == status(sec_fetch_site="same-site") == 403
    assert status(sec_fetch_site="same-origin") == 200
    for wrong in ("", "Bearer", f"Bearer {_TOKEN}x", f"Basic {_TOKEN}", "Bearer é".encode()):
        answer = client.get("/api/settings", headers={"Authorization": wrong})
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert (
            client.delete("/api/classifiers/x", headers={"Authorization": wrong}).status_code == 401
        )
    assert client.get("/").status_code == client.get("/health").status_code == 200


def test_pages_run_only_their_own_script(serve):
    client = serve()
    for path in ("/", "/docs"):
        answer = client.get(path)
        rules = answer.headers["content-security-policy"]
        assert "default-src 'none'" in rules and "unsafe" not in rules
        assert rules.count("'sha256-") == 2 and "frame-ancestors 'none'" in rules
        outside = re.findall(r"(?:src|href)=\"([^\"]*)\"|url\(", answer.text)
        assert set(outside) <= {"data:,", "/docs", "/openapi.json"}
        assert not re.search(r"\son\w+=|\sstyle=\"|javascript:", answer.text)
        assert answer.headers["x-content-type-options"] == "nosniff"
    paths = client.get("/openapi.json").json()["paths"]
    assert len(paths) == 9 and all(
        one.get("description") for methods in paths.values() for one in methods.values()
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["port=x"], "port=x: should be a number"),
        (["port=99999"], "port=99999"),
        (["prot=1"], "did you mean port?"),
        (["folder"], "key=value only"),
        (["host=0.0.0.0"], "token is required"),
        (["token_file=empty"], "empty"),
        (["token_file=short", "host=0.0.0.0"], "at least 16"),
        (["token_file=nowhere"], "nowhere"),
        (["host=203.0.113.1"], "token is required"),
        (["classifier=x", "head=ridge"], "applies without classifier="),
        (["run=a", "backbone=b"], "not both"),
        (["run=nowhere", "port=0"], "nowhere"),
        (["run=run", "port=0", "head=nearst"], "head=nearst"),
        (["run=run", "port=0", "state=short"], "state=short"),
        (["port={busy}"], "choose another port="),
    ],
)
def test_mistakes_are_one_line(words, message, tmp_path, run_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("METALEARN_TOKEN", raising=False)
    (tmp_path / "run").symlink_to(run_folder)
    (tmp_path / "short").write_text("secret")
    (tmp_path / "empty").write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        words = [word.replace("{busy}", port) for word in words]
        monkeypatch.setattr(sys, "argv", ["metalearn", "serve", *words])
        with pytest.raises(SystemExit) as stopped:
            main_module.main()
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0] and "secret" not in lines[0]


def test_a_run_without_images_is_refused(serve, tmp_path, cache_dir):
    small = ["algo=protonet", "backbone=mlp", "train.steps=2", "val.episodes=2", "logger=none"]
    run = train(tmp_path / "run", cache_dir, "dataset=gaussians", *small, base=[])
    with pytest.raises(UserError, match="no images"):
        serve(settings=FewShotClassifier(run=run))


def test_help_and_completion_name_the_arguments(capsys):
    takes = {"serve": command.TAKES}
    assert candidates("metalearn serve po", takes) == ["port="]
    for key in _arguments.keys(command.TAKES):
        assert re.search(rf"\b{key}=", command.HELP)
    assert "serve" in main_module.commands()


@pytest.mark.slow
def test_every_acknowledged_example_survives_kill_9_and_ctrl_c_is_one_line(
    start, run_folder, tmp_path
):
    words = ["serve", f"run={run_folder}", "head=ridge", "port=0", f"state={tmp_path}/state"]

    def started():
        served = start(*words)
        served.wait_until(lambda: "http://" in served.stdout)
        return served, int(re.findall(r":(\d+) ", served.stdout)[0])

    def send(port, method, path, form=None):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body, headers = b"", {}
        if form is not None:
            parts = []
            for name, (file, data) in form:
                extra = f'; filename="{file}"' if file else ""
                head = f'--x\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'
                parts.append(head.encode() + data + b"\r\n")
            body = b"".join(parts) + b"--x--\r\n"
            headers["Content-Type"] = "multipart/form-data; boundary=x"
        connection.request(method, path, body, headers)
        return json.loads(connection.getresponse().read())

    acknowledged = []
    served, port = started()
    own = send(port, "POST", "/api/classifiers", [("name", ("", b"mine"))])["id"]
    for turn in range(3):
        killer = threading.Timer(0.15 + 0.1 * turn, os.kill, (served.pid, signal.SIGKILL))
        killer.start()
        try:
            for number in range(10_000):
                form = [("files", (f"{turn}-{number}.png", image(number % 2, number))),
                        ("labels", ("", b"ab"[number % 2 : number % 2 + 1]))]  # fmt: skip
                answer = send(port, "POST", f"/api/classifiers/{own}/examples", form)
                acknowledged += [one["id"] for one in answer["added"]]
        except (OSError, http.client.HTTPException):
            pass
        served.wait()
        served, port = started()
        content = send(port, "GET", f"/api/classifiers/{own}")
        assert set(acknowledged) <= {one["id"] for one in content["examples"]}
    assert len(acknowledged) > 3
    served.send(signal.SIGINT)
    served.wait()
    assert served.returncode == 130
    assert served.stderr == "metalearn: interrupted by SIGINT\n"


@pytest.mark.slow
def test_page_labels_images_and_corrects_a_label(browse, run_folder, tmp_path):
    page = browse(f"run={run_folder}", "head=nearest", token=_TOKEN)
    page.get_by_label("requires a token").fill(_TOKEN)
    page.keyboard.press("Enter")
    for kind, label in enumerate(["level", _HOSTILE]):
        for number in range(3):
            (tmp_path / f"{kind}{number}.png").write_bytes(image(kind, number))
        page.get_by_label("Name of a new class").fill(label)
        page.keyboard.press("Enter")
        page.get_by_label(f"Add images of {label}").set_input_files(
            sorted(tmp_path.glob(f"{kind}*.png"))
        )
        page.get_by_text("3 examples", exact=True).nth(kind).wait_for()
    for name, data in (("=q.png", image(0, 20)), ("wrong.png", image(2, 1, 40)), ("x.png", b"no")):
        (tmp_path / name).write_bytes(data)
    queries = [tmp_path / name for name in ("=q.png", "wrong.png", "x.png")]
    page.locator("#queries").set_input_files(queries)
    card = page.get_by_role("article", name="=q.png")
    card.locator(".bar.second").wait_for()
    assert card.locator(".label").inner_text() == "level" and "%" in card.inner_text()
    page.get_by_role("article", name="x.png").get_by_text("not readable").wait_for()

    # The correction, by keyboard: a new class gets its first example.
    page.get_by_label("Name of a new class").fill("third")
    page.keyboard.press("Enter")
    button = page.get_by_role("article", name="wrong.png").get_by_role("button", name="It is third")
    button.focus()
    page.keyboard.press("Enter")
    column = page.get_by_role("region", name="Class third")
    column.get_by_text("1 example", exact=True).wait_for()
    page.locator("#queries").set_input_files([queries[1]])
    card = page.get_by_role("article", name="wrong.png")
    card.locator(".label", has_text="third").wait_for()

    with page.expect_download() as table:
        page.get_by_role("button", name="Download CSV").click()
    rows = list(csv.DictReader(Path(table.value.path()).read_text().splitlines()))
    assert [row["label"] for row in rows] == ["level", "", "third"]
    assert [row["file"] for row in rows] == ["'=q.png", "x.png", "wrong.png"]
    with page.expect_download() as archive:
        page.get_by_role("button", name="Download classifier").click()
    with zipfile.ZipFile(archive.value.path()) as content:
        content.extractall(tmp_path / "unzipped")
    assert FewShotClassifier.load(tmp_path / "unzipped").classes_.tolist() == [
        _HOSTILE, "level", "third",
    ]  # fmt: skip
    column.get_by_role("button", name="Remove the class third").click()
    column.wait_for(state="detached")
    page.reload()
    page.get_by_text("3 examples", exact=True).nth(1).wait_for()
    assert page.locator("img[src=x]").count() == 0


@pytest.mark.slow
def test_page_recognises_drawings_by_mouse_and_keyboard(browse, run_folder):
    page = browse(f"run={run_folder}", "head=nearest")
    canvas = page.locator("#canvas")
    page.get_by_text("0 of 2 classes").wait_for()
    box = canvas.bounding_box()

    def line(*points):
        places = [(box["x"] + 300 * x, box["y"] + 300 * y) for x, y in points]
        page.mouse.move(*places[0])
        page.mouse.down()
        for place in places[1:]:
            page.mouse.move(*place, steps=5)
        page.mouse.up()

    line((0.2, 0.5), (0.9, 0.5))
    page.get_by_role("button", name="New class", exact=True).click()
    page.get_by_role("region", name="Class sign 1").wait_for()
    # The second class is drawn and named by keyboard alone.
    canvas.focus()
    for key in (*["ArrowUp"] * 5, " ", *["ArrowDown"] * 9, " "):
        page.keyboard.press(key)
    page.keyboard.press("n")
    page.get_by_role("region", name="Class sign 2").wait_for()
    answer = page.locator("#answer")
    for points, label in ((((0.5, 0.1), (0.5, 0.8)), "2"), (((0.1, 0.4), (0.8, 0.4)), "1")):
        canvas.focus()
        page.keyboard.press("Escape")
        line(*points)
        answer.locator(".big", has_text=f"sign {label}").wait_for()
    page.keyboard.press("1")  # it is the first class
    region = page.get_by_role("region", name="Class sign 1")
    region.get_by_text("2 examples", exact=True).wait_for()
    region.get_by_role("button", name="Remove drawing.png").first.focus()
    page.keyboard.press("Enter")
    region.get_by_text("1 example", exact=True).wait_for()
