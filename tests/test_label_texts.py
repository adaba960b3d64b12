"""Labels for your own texts: `metalearn predict`, `serve` and FewShotClassifier."""

import csv
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from omegaconf import OmegaConf
from PIL import Image

import metalearn
from metalearn import FewShotClassifier
from metalearn.cli import predict as command
from metalearn.cli.main import main
from metalearn.config import composition
from metalearn.config.checking import check_config
from metalearn.predict import inputs
from metalearn.predict.server import create_app
from metalearn.predict.store import ClassifierStore
from metalearn.predict.uploads import Limits
from metalearn.report.progress import SILENT
from metalearn.run import loop
from metalearn.run.build import build
from metalearn.system.errors import UserError
from tests.test_text import write_csv

_HOSTILE = "=the weather <script>alert(1)</script> naïve"
EXAMPLES = {
    "card": ["my card is lost", "block my card", "a new card please", "the card was stolen"],
    "weather": ["will it rain", "the weather today", "is it cold outside", "rain or sun today"],
}
X = [text for texts in EXAMPLES.values() for text in texts]
Y = [label for label, texts in EXAMPLES.items() for _ in texts]


@pytest.fixture
def folder(tmp_path, monkeypatch, cache_dir):
    """Return a folder with examples/<class>.txt, examples.csv and new.txt, as working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METALEARN_CACHE", str(cache_dir))
    (tmp_path / "examples").mkdir()
    for label, texts in EXAMPLES.items():
        (tmp_path / "examples" / f"{label}.txt").write_text("\n".join(texts) + "\n\n")
    with (tmp_path / "examples.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("label", "text"), *zip(Y, X, strict=True)])
    (tmp_path / "new.txt").write_bytes(f"where is my card\r\n\r\n{_HOSTILE}".encode("cp1252"))
    return tmp_path


@pytest.fixture
def predict(monkeypatch):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["metalearn", "predict", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code

    return run


def rows_of(out):
    with (out / "predictions.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("support", ["examples", "examples.csv"])
def test_files_of_texts_are_labelled_and_escaped(support, folder, predict, capsys):
    words = ["query=new.txt", "backbone=bag_of_ngrams", "head=prototype", "out=out"]
    assert predict(f"support={support}", *words) == 0
    printed = capsys.readouterr().out
    assert "Texts labelled: 2." in printed and "if the texts are like these" in printed
    rows = rows_of(folder / "out")
    assert [row["label"] for row in rows] == ["card", "weather"]
    assert [row["text"] for row in rows] == ["where is my card", f"'{_HOSTILE}"]
    assert [row["file"] for row in rows] == ["new.txt:1", "new.txt:3"]
    result = json.loads((folder / "out" / "predictions.json").read_text())
    assert result["predictions"][1]["text"] == _HOSTILE
    page = (folder / "out" / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "block my card" in page

    assert predict("classifier=out/classifier", "query=new.txt", "out=again") == 0
    assert (folder / "again/predictions.csv").read_bytes() == (
        folder / "out/predictions.csv"
    ).read_bytes()


def test_without_an_encoder_one_line_says_so(folder, predict, capsys, monkeypatch):
    monkeypatch.setattr(command, "_ENCODER", ("no_such_package",))
    assert predict("support=examples", "query=new.txt", "out=out") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "no sentence encoder is installed" in line and "minilm" in line
    saved = json.loads((folder / "out/classifier/classifier.json").read_text())
    assert saved["settings"]["backbone"] == "bag_of_ngrams"


def test_default_of_texts_is_the_encoder_with_its_settings():
    assert command._backbone("", "images") == "efficientnet_lite0"
    assert command._backbone("'' backbone.model=/here", "texts") == (
        "text_encoder backbone.model=/here"
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_sources_of_texts(encoding, folder):
    (folder / "plain.txt").write_bytes("one\r\n\n naïve two \rthree".encode(encoding))
    assert [item.value for item in inputs.queries(["plain.txt"], folder)] == [
        "one", "naïve two", "three",
    ]  # fmt: skip
    (folder / "headless.csv").write_bytes('"naïve, one",a\ntwo,b\n'.encode(encoding))
    items = inputs.examples("headless.csv", folder)
    assert [(item.name, item.value, item.label) for item in items] == [
        ("headless.csv:1", "naïve, one", "a"), ("headless.csv:2", "two", "b"),
    ]  # fmt: skip
    (folder / "deep" / "card").mkdir(parents=True)
    (folder / "deep" / "card" / "1.txt").write_text("first\nsecond")
    assert {item.label for item in inputs.examples("deep", folder)} == {"card"}
    (folder / "unpacked").mkdir()
    with zipfile.ZipFile(folder / "examples.zip", "w") as archive:
        archive.write(folder / "examples" / "card.txt", "card.txt")
    (first, *_) = inputs.examples("examples.zip", folder / "unpacked")
    assert (first.name, first.value, first.label) == ("examples.zip/card.txt:1", X[0], "card")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["support=blank.csv"], "blank.csv:3 is not a readable text (it is empty)"),
        (["support=empty"], "empty/b.txt: there is no text in this file"),
        (["support=binary.csv"], "binary.csv cannot be read (it has zero bytes"),
        (["support=headed.csv"], "headed.csv: its first row names no column text"),
        (["support=new.txt"], "new.txt:1 has no label; put texts into one .txt file per class"),
        (["support=one.csv"], "at least 2"),
        (["support=examples", "query=x.png"], "x.png: backbone=bag_of_ngrams takes texts"),
        (["support=examples", "query=nothing"], "nothing: no images there, and no .txt files"),
        (["support=examples", "query=missing.txt"], "missing.txt: there is no such file"),
        (["support=examples", "backbone=efficientnet_lite0"], "takes images, not texts"),
        (["support=examples", "backbone=text_transformer"], "should be a pretrained network"),
        (["support=examples", "backbone=text_encoder backbone.model=no/where"], "no/where"),
    ],
)
def test_mistakes_are_one_line(words, message, folder, predict, capsys):
    pytest.importorskip("transformers")
    (folder / "blank.csv").write_text('text,label\na,b\n" ",c\n')
    (folder / "empty").mkdir()
    (folder / "empty" / "a.txt").write_text("a")
    (folder / "empty" / "b.txt").write_text(" \n")
    (folder / "binary.csv").write_bytes("a,b\n".encode("utf-16-le"))
    (folder / "headed.csv").write_text("label,comment\na,b\n")
    (folder / "one.csv").write_text("a,b\nc,b\n")
    (folder / "nothing").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "x.png")
    given = " ".join(words)
    words = words if "query" in given else [*words, "query=new.txt"]
    words = words if "backbone" in given else [*words, "backbone=bag_of_ngrams"]
    assert predict(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (folder / "outputs").exists()


def test_an_empty_text_to_label_is_an_error_of_its_row(folder, predict, capsys):
    (folder / "new.csv").write_text('text\n" "\nmy card\n')
    words = ["query=new.csv", "backbone=bag_of_ngrams", "out=out", "head=prototype"]
    assert predict("support=examples", *words) == 0
    assert "Texts labelled: 1, 1 cannot be read." in capsys.readouterr().out
    assert [(row["label"], row["error"]) for row in rows_of(folder / "out")] == [
        ("", "it is empty"), ("card", ""),
    ]  # fmt: skip


def test_a_class_with_one_example_is_named(folder, predict, capsys):
    (folder / "examples" / "music.txt").write_text("play a song")
    words = ["query=new.txt", "backbone=bag_of_ngrams", "out=out", "head=prototype"]
    assert predict("support=examples", *words) == 0
    assert "Not checked, as they have one example: music." in capsys.readouterr().out


def test_classifier_takes_lists_of_strings(folder):
    classifier = FewShotClassifier("bag_of_ngrams", "prototype").fit(X, Y)
    assert classifier.predict(["my card", "rain today"]).tolist() == ["card", "weather"]
    array = np.array(["my card", "rain today"])
    np.testing.assert_array_equal(
        classifier.predict_proba(array), classifier.predict_proba(array.tolist())
    )
    # Prototypes of the features, by hand.
    z = classifier.represent(X)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    means = np.stack([z[np.array(Y) == label].mean(0) for label in EXAMPLES])
    nearest = ((z[:, None] - means) ** 2).sum(-1).argmin(1)
    assert classifier.predict(X).tolist() == [list(EXAMPLES)[index] for index in nearest]
    classifier.partial_fit(["play a song", "music please"], ["music", "music"])
    assert classifier.predict(["play music"]).tolist() == ["music"]
    with pytest.raises(UserError, match="should be a list"):
        classifier.predict("my card")
    with pytest.raises(UserError, match=r"text 1 is not a readable text \(it is empty\)"):
        classifier.predict(["a", ""])
    with pytest.raises(UserError, match="it is no text but int"):
        classifier.predict([["a"], 3][1:])


@pytest.fixture
def text_run(tmp_path, cache_dir):
    """Train a short run on texts; return its folder."""

    def train(*overrides):
        path = write_csv(tmp_path / "intents.csv")
        small = [
            "dataset=text", f"dataset.path={path}", "backbone=bag_of_ngrams",
            "backbone.frozen=false", "episode.way=2", "episode.query=3", "train.steps=2",
            "val.episodes=2", "test.episodes=2", "logger=none", f"cache_dir={cache_dir}",
        ]  # fmt: skip
        config = composition.compose_config([*small, *overrides])
        folder = tmp_path / "run"
        folder.mkdir()
        loop.fit(build(check_config(config)), SILENT, folder)
        OmegaConf.save(config, folder / "config.yaml", resolve=True)
        return folder

    return train


@pytest.mark.parametrize("algo", [pytest.param("maml", marks=pytest.mark.slow), "protonet"])
def test_a_run_on_texts_labels_texts(algo, text_run, folder, predict):
    run = text_run(f"algo={algo}")
    queries = ["my card", "rain " * 200]
    classifier = FewShotClassifier(run=run, calibrate=False).fit(X, Y)
    model = metalearn.load(run).adapt(X, Y)
    np.testing.assert_allclose(
        classifier.predict_proba(queries), model.probabilities(queries).numpy(), atol=1e-6
    )
    words = ["support=examples", "query=new.txt", f"run={run}", "out=out"]
    assert predict(*words) == 0
    assert predict("classifier=out/classifier", "query=new.txt", "out=again") == 0
    assert rows_of(folder / "again") == rows_of(folder / "out")
    assert predict("support=examples", "query=x.png", f"run={run}") == 2


def test_export_of_texts_is_refused(folder, predict, monkeypatch, capsys):
    FewShotClassifier("bag_of_ngrams", "prototype").fit(X, Y).save(folder / "classifier")
    monkeypatch.setattr(sys, "argv", ["metalearn", "export", "classifier=classifier"])
    with pytest.raises(SystemExit) as stopped:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "learns from texts" in line


@pytest.fixture
def client(folder):
    limits = Limits(files=10, characters=100)
    classifier = FewShotClassifier("bag_of_ngrams", "prototype")
    app = create_app(ClassifierStore(folder / "state", classifier, limits))
    with TestClient(app, base_url="http://127.0.0.1") as opened:
        yield opened


def test_server_learns_and_labels_texts(client, folder):
    assert client.get("/api/settings").json()["kind"] == "texts"
    answer = client.post("/api/classifiers", json={"text": X, "labels": Y, "name": "intents"})
    own = answer.json()
    assert answer.status_code == 201 and own["classes"] == {"card": 4, "weather": 4}
    assert own["name"] == "intents"
    path = f"/api/classifiers/{own['id']}"
    expected = FewShotClassifier("bag_of_ngrams", "prototype").fit(X, Y)
    for text in ("where is my card", [_HOSTILE, "rain"]):
        rows = client.post(f"{path}/predict", json={"text": text}).json()["predictions"]
        texts = [text] if isinstance(text, str) else text
        assert [row["text"] for row in rows] == texts
        assert [row["label"] for row in rows] == expected.predict(texts).tolist()
        np.testing.assert_allclose(
            [row["probability"] for row in rows], expected.predict_proba(texts).max(1), atol=1e-6
        )
    table = client.post(f"{path}/predict?table=true", json={"text": _HOSTILE}).text
    (row,) = csv.DictReader(table.splitlines())
    assert row["text"] == f"'{_HOSTILE}"
    added = client.post(f"{path}/examples", json={"text": ["a song", "play it"], "labels": "music"})
    assert added.status_code == 201 and added.json()["classes"]["music"] == 2
    examples = client.get(path).json()["examples"]
    assert [one["text"] for one in examples] == [*X, "a song", "play it"]
    again = ClassifierStore(
        folder / "state", FewShotClassifier("bag_of_ngrams", "prototype"), Limits()
    )
    assert again.briefs()[0]["classes"] == {"card": 4, "music": 2, "weather": 4}


@pytest.mark.parametrize(
    ("status", "request_", "message"),
    [
        (422, {"json": {"text": ["a", " "], "labels": "x"}}, "text 2 is not a readable text"),
        (422, {"json": {"text": ["a", "b"], "labels": ["x", "y", "z"]}}, "2 texts have 3 labels"),
        (422, {"json": {"text": 3, "labels": "x"}}, "the JSON is not"),
        (422, {"json": {"labels": "x"}}, "there is no file and no text"),
        (422, {"content": b"{", "headers": {"content-type": "application/json"}}, "the JSON is"),
        (413, {"json": {"text": "a" * 101, "labels": "x"}}, "at most 100 characters"),
        (413, {"json": {"text": ["a"] * 11, "labels": "x"}}, "at most 10 files or texts"),
        (422, {"files": [("files", ("a.txt", b"a"))], "data": {"labels": "x"}}, "labels texts"),
    ],
)
def test_requests_that_are_refused(status, request_, message, client):
    own = client.post("/api/classifiers").json()["id"]
    answer = client.post(f"/api/classifiers/{own}/examples", **request_)
    assert answer.status_code == status and message in answer.json()["detail"]
    assert client.get(f"/api/classifiers/{own}").json()["examples"] == []


@pytest.mark.slow
def test_page_labels_typed_and_dropped_texts(browse, folder):
    page = browse("backbone=bag_of_ngrams", "head=prototype")
    for label, texts in EXAMPLES.items():
        page.get_by_label("Name of a new class").fill(label)
        page.keyboard.press("Enter")
        region = page.get_by_role("region", name=f"Class {label}")
        region.get_by_label(f"New texts of {label}").fill("\n".join(texts[:2]) + "\n\n")
        region.get_by_role("button", name="Add", exact=True).click()
        region.get_by_text("2 examples", exact=True).wait_for()
        region.get_by_label(f"Add texts of {label}").set_input_files(
            folder / f"examples/{label}.txt"
        )
        region.get_by_text("6 examples", exact=True).wait_for()
    page.get_by_label("Texts to label").fill(f"where is my card\n{_HOSTILE}")
    page.get_by_role("button", name="Label", exact=True).click()
    card = page.get_by_role("article", name=_HOSTILE)
    card.locator(".label", has_text="weather").wait_for()
    card.get_by_role("button", name="It is card").click()  # a correction
    page.get_by_text("7 examples", exact=True).wait_for()
    with page.expect_download() as table:
        page.get_by_role("button", name="Download CSV").click()
    (row,) = csv.DictReader(Path(table.value.path()).read_text().splitlines())
    assert (row["text"], row["label"]) == ("where is my card", "card")
