"""`metalearn predict`: labels for your own images."""

import csv
import io
import json
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image, ImageDraw

import metalearn
from metalearn import FewShotClassifier
from metalearn.cli import _arguments
from metalearn.cli import predict as command
from metalearn.cli._completion import candidates
from metalearn.cli.main import main
from metalearn.config.checking import check_config
from metalearn.predict import inputs, report
from metalearn.report.progress import SILENT
from metalearn.run import loop
from metalearn.run.build import build
from metalearn.system.errors import UserError

#: A class whose name is a formula and a tag.
_HOSTILE = "=1+<b>"


@pytest.fixture
def run_folder(compose, tmp_path):
    """Train a short run; return its folder."""

    def train(*overrides):
        config = compose(*overrides)
        folder = tmp_path / "run"
        folder.mkdir()
        loop.fit(build(check_config(config)), SILENT, folder)
        OmegaConf.save(config, folder / "config.yaml", resolve=True)
        return folder

    return train


def draw(path, kind, number):
    """Draw one of three shapes in a mode, size and place that vary with the number."""
    rng = np.random.default_rng([number, kind])
    size = int(rng.integers(24, 60))
    image = Image.new("L", (size, size), 255)
    box = [size * (0.2 + 0.05 * rng.random()), size * 0.25, size * 0.75, size * 0.8]
    pen = ImageDraw.Draw(image)
    if kind == 0:
        pen.ellipse(box, outline=0, width=3)
    elif kind == 1:
        pen.line(box, fill=0, width=4)
    else:
        pen.rectangle(box, fill=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.convert(["L", "RGB", "RGBA", "P"][number % 4]).save(path)


@pytest.fixture
def images(tmp_path):
    """Return a folder with examples/ of three classes with 4, 5 and 6 examples, and new/."""
    for kind, name in enumerate(["circle", "line", _HOSTILE]):
        for number in range(4 + kind):
            draw(tmp_path / "examples" / name / f"{number}.png", kind, number)
        for number in range(10, 14):
            draw(tmp_path / "new" / f"{name[0]}{number}.png", kind, number)
    (tmp_path / "new" / "broken.png").write_bytes(b"no image")
    return tmp_path


def run_command(monkeypatch, *words):
    """Run `metalearn predict` in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["metalearn", "predict", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def read(folder):
    with (folder / "predictions.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return rows, json.loads((folder / "predictions.json").read_text())


def test_labels_files_and_page(images, run_folder, monkeypatch, capsys):
    run, out = run_folder("algo=protonet"), images / "out"
    words = [f"support={images}/examples", f"query={images}/new", f"run={run}", f"out={out}"]
    assert run_command(monkeypatch, *words) == 0
    printed = capsys.readouterr().out
    assert "Images labelled: 12, 1 cannot be read." in printed
    assert re.search(r"Expect \d+ to \d+% of the labels to be right", printed)
    rows, result = read(out)
    assert [row["file"] for row in rows] == [
        str(path) for path in sorted((images / "new").iterdir())
    ]
    by_name = {Path(row["file"]).name: row for row in rows}
    assert by_name["broken.png"]["label"] == "" and by_name["broken.png"]["error"]
    right = {"c": "circle", "l": "line", "=": f"'{_HOSTILE}"}
    labelled = [row for row in rows if row["label"]]
    assert len(labelled) == 12
    assert sum(right[Path(row["file"]).name[0]] == row["label"] for row in labelled) >= 9
    for row, one in zip(rows, result["predictions"], strict=True):
        assert row["label"] == report.harmless(one["label"] or "")
        assert row["unknown"] in (("yes", "no") if one["label"] else ("",))
    assert result["examples"] == {"circle": 4, "line": 5, _HOSTILE: 6}
    page = (out / "report.html").read_text()
    assert "<b>" not in page and "=1+&lt;b&gt;" in page
    assert page.count("data:image/jpeg;base64,") == 15 + 12
    assert not re.search(r"(?:src|href)=\"(?!data:)|<script|url\(", page)

    # The saved classifier gives the same labels without the examples.
    again = images / "again"
    words = [f"classifier={out}/classifier", f"query={images}/new", f"out={again}"]
    assert run_command(monkeypatch, *words) == 0
    assert (again / "predictions.csv").read_bytes() == (out / "predictions.csv").read_bytes()
    assert (again / "report.html").read_text() == page


def test_add_and_remove_leave_the_rest_and_the_original(images, run_folder, monkeypatch, capsys):
    run, out = run_folder("algo=protonet"), images / "out"
    run_command(
        monkeypatch, f"support={images}/examples", f"query={images}/new", f"run={run}",
        f"out={out}", "head=ridge",
    )  # fmt: skip
    original = FewShotClassifier.load(out / "classifier")
    for number in range(3):
        draw(images / "more" / "line" / f"{number}.png", 1, 20 + number)
        draw(images / "more" / "blank" / f"{number}.png", 2, 30 + number)
    words = [
        f"classifier={out}/classifier", f"add={images}/more", "remove=circle", f"out={images}/2",
        f"query={images}/new", "error_rate=0.2",
    ]  # fmt: skip
    assert run_command(monkeypatch, *words) == 0
    changed = FewShotClassifier.load(images / "2" / "classifier")
    assert changed.classes_.tolist() == [_HOSTILE, "blank", "line"]
    assert (
        FewShotClassifier.load(out / "classifier").classes_.tolist() == original.classes_.tolist()
    )
    for name, count in ((_HOSTILE, 6), ("line", 5)):
        before, after = (one.examples_[one.labels_ == name] for one in (original, changed))
        np.testing.assert_array_equal(after[:count], before)
    assert changed.confidence_.error_rate == changed.error_rate == 0.2


def test_without_images_there_is_a_classifier(images, run_folder, monkeypatch, capsys):
    out = images / "out"
    words = [f"support={images}/examples", f"run={run_folder('algo=protonet')}", f"out={out}"]
    assert run_command(monkeypatch, *words, "head=nearest") == 0
    assert "labelled:" not in capsys.readouterr().out
    assert read(out)[0] == [] and FewShotClassifier.load(out / "classifier").head_ == "nearest"


def test_a_failure_leaves_the_classifier_as_it_was(images, run_folder):
    # The number of classes is part of the weights of MAML.
    folder = run_folder("algo=maml", "episode.way=3")
    items = inputs.examples(str(images / "examples"), images)
    classifier = FewShotClassifier(run=folder, calibrate=False)
    classifier.fit([item.value for item in items], [item.label for item in items])
    before = classifier.predict_proba([items[0].value])
    with pytest.raises(UserError, match="4 classes in the examples; this run distinguishes 3"):
        classifier.partial_fit([items[0].value], ["fourth"])
    assert classifier.classes_.tolist() == [_HOSTILE, "circle", "line"]
    np.testing.assert_array_equal(classifier.predict_proba([items[0].value]), before)
    with pytest.raises(UserError, match="leave out head="):
        FewShotClassifier(run=folder, head="ridge").fit([items[0].value], ["a"])


@pytest.mark.parametrize("algo", ["maml", "matching"])
def test_run_adapts_as_it_was_trained(images, run_folder, algo):
    folder = run_folder(f"algo={algo}", "episode.way=3")
    items = inputs.examples(str(images / "examples"), images)
    new = [item.value for item in inputs.queries([str(images / "new" / "c*.png")], images)]
    x, y = [item.value for item in items], [item.label for item in items]
    classifier = FewShotClassifier(run=folder, calibrate=False).fit(x, y)
    model = metalearn.load(folder).adapt(x, y)
    order = [model.classes.index(name) for name in classifier.classes_]
    expected = model.probabilities(new)[:, order].numpy()
    np.testing.assert_allclose(classifier.predict_proba(new), expected, atol=1e-6)
    # Cross-validation adapts the run to parts of the examples; the labels do not change by it.
    trusted = FewShotClassifier(run=folder).fit(x, y)
    assert trusted.confidence_.examples == 15 and trusted.confidence_.interval() is not None
    assert trusted.predict(new).tolist() == classifier.predict(new).tolist()


def test_a_saved_classifier_can_be_moved_without_its_run(images, run_folder, monkeypatch):
    run, out = run_folder("algo=protonet", f"data_dir={images}/private"), images / "out"
    words = [f"support={images}/examples", f"run={run}", "head=nearest"]
    assert run_command(monkeypatch, *words, f"query={images}/new", f"out={out}") == 0
    run.rename(images / "elsewhere")
    moved = images / "moved"
    (out / "classifier").rename(moved)
    classifier, again = FewShotClassifier.load(moved), images / "again"
    classifier.save(moved)
    words = [f"classifier={moved}", f"query={images}/new", f"out={again}"]
    assert run_command(monkeypatch, *words) == 0
    assert (again / "predictions.csv").read_bytes() == (out / "predictions.csv").read_bytes()
    names = {path.relative_to(moved).parts[-1] for path in moved.rglob("*") if path.is_file()}
    assert {name for name in names if "arrays" not in name} == {
        "classifier.json", "config.yaml", "best.pt",
    }  # fmt: skip
    settings = (next(moved.rglob("config.yaml"))).read_text()
    assert str(images) not in settings + str(json.loads((moved / "classifier.json").read_text())[
        "settings"])  # fmt: skip


def test_a_classifier_of_an_earlier_version_takes_its_run_again(images, run_folder, monkeypatch):
    run = run_folder("algo=protonet")
    items = inputs.examples(str(images / "examples"), images)
    classifier = FewShotClassifier(run=run, head="prototype")
    classifier.fit([item.value for item in items], [item.label for item in items])
    folder = images / "classifier"
    classifier.save(folder)
    content = json.loads((folder / "classifier.json").read_text())
    content["settings"]["run"] = str(run)  # as it was saved
    (folder / "classifier.json").write_text(json.dumps(content))
    assert FewShotClassifier.load(folder).head_ == "prototype"
    run.rename(images / "elsewhere")
    with pytest.raises(UserError, match=str(run)):
        FewShotClassifier.load(folder)
    assert FewShotClassifier.load(folder, images / "elsewhere").head_ == "prototype"


def test_changed_weights_are_refused(images, run_folder):
    folder = run_folder("algo=protonet")
    items = inputs.examples(str(images / "examples"), images)
    classifier = FewShotClassifier(run=folder, head="prototype")
    classifier.fit([item.value for item in items], [item.label for item in items])
    classifier.save(images / "classifier")
    for best in (folder / "checkpoints" / "best.pt", next((images / "classifier").rglob("*.pt"))):
        FewShotClassifier.load(images / "classifier")
        with zipfile.ZipFile(best, "a") as archive:
            archive.comment = b"changed"
    for run in (None, folder):
        with pytest.raises(UserError, match="other weights"):
            FewShotClassifier.load(images / "classifier", run)


def test_json_is_all_that_is_printed(images, run_folder, monkeypatch, capsys):
    run, out = run_folder("algo=protonet"), images / "out"
    words = [f"support={images}/examples", f"run={run}", f"out={out}", "head=nearest", "--json"]
    assert run_command(monkeypatch, *words, images / "new" / "c10.png") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "predictions.json").read_text())
    assert len(printed["predictions"]) == 1 and printed["head"] == "nearest"


def test_support_and_query_sources(images, tmp_path):
    folder = inputs.examples(str(images / "examples"), tmp_path)
    table = images / "examples.csv"
    with table.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["label", "path"])
        rows.writerows(
            [item.label, Path(item.value).relative_to(images).as_posix()] for item in folder
        )
    listed = inputs.examples(str(table), tmp_path)
    assert [(one.value, one.label) for one in listed] == [(one.value, one.label) for one in folder]
    table.write_text("\n".join(f"{item.value},{item.label}" for item in folder))  # no header
    assert inputs.examples(str(table), tmp_path)[3].label == folder[3].label

    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    with zipfile.ZipFile(images / "examples.zip", "w") as archive:
        for item in folder:
            archive.write(item.value, f"top/{item.label}/{Path(item.value).name}")
        archive.write(folder[0].value, "/etc/circle/outside.png")
    zipped = inputs.examples(str(images / "examples.zip"), unpacked)
    assert sorted(one.label for one in zipped) == sorted([*(one.label for one in folder), "circle"])
    assert {Path(one.value).parent for one in zipped} == {unpacked}
    assert all(Image.open(one.value).size[0] for one in zipped)

    new = images / "new"
    several = inputs.queries([str(new / "c*.png"), str(new / "c10.png"), str(new)], tmp_path)
    assert len(several) == len(list(new.iterdir()))
    listing = images / "list.csv"
    listing.write_text("file\nnew/c10.png\nnowhere.png\n")
    assert [Path(one.value).exists() for one in inputs.queries([str(listing)], tmp_path)] == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "support=<examples> or classifier=<folder>"),
        (["support=examples", "classifier=x"], "support=<examples> or classifier=<folder>"),
        (["support=nowhere", "query=new"], "nowhere: there is no such file"),
        (["support=examples", "query=nowhere/*.png"], "nowhere/*.png: no images there"),
        (["support=new", "query=new"], "has no label"),
        (["support=examples", "query=new", "heed=auto"], "did you mean head?"),
        (["support=examples", "query=new", "head=nearst", "run=run"], "head=nearst"),
        (["support=examples", "query=new", "error_rate=2", "run=run"], "error_rate=2"),
        (["support=examples", "query=new", "error_rate=x"], "error_rate"),
        (["support=examples", "query=new", "add=more"], "applies to classifier="),
        (["classifier=nowhere", "query=new", "head=auto"], "applies to support="),
        (["classifier=nowhere", "query=new"], "no such file"),
        (["support=examples", "query=new", "run=nowhere"], "nowhere"),
        (["support=examples", "query=new", "run=a", "backbone=b"], "not both"),
        (["support=examples", "query=new", "backbone=conv4"], "backbone=Conv4"),
        (["support=examples", "backbone=timm hydra.run.dir=x"], "is no setting of a backbone"),
        (["support=examples", "backbone=../base"], "../base: there is no such"),
        (["support=one", "query=new", "run=run"], "at least 2"),
        (["support=bad", "query=new", "run=run"], "bad/a/x.png is not a readable image"),
    ],
)  # fmt: skip
def test_mistakes_are_named_in_one_line(words, message, images, run_folder, monkeypatch, capsys):
    if "run=run" in words:
        run_folder("algo=protonet")
    draw(images / "one" / "a" / "x.png", 0, 0)
    for name in "ab":
        (images / "bad" / name).mkdir(parents=True)
        (images / "bad" / name / "x.png").write_bytes(b"no image")
    monkeypatch.chdir(images)
    assert run_command(monkeypatch, *words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not (images / "outputs").exists()


def test_cells_are_harmless_in_a_spreadsheet():
    for start in "=+-@\t\r":
        assert report.harmless(f"{start}SUM(A1)") == f"'{start}SUM(A1)"
    assert report.harmless("a=b") == "a=b" and report.harmless(-0.5) == -0.5


def test_completion_offers_the_arguments():
    takes = {"predict": command.TAKES}
    assert candidates("metalearn predict hea", takes) == ["head="]
    assert candidates("metalearn predict head=co", takes) == ["head=cosine "]
    for key in _arguments.keys(command.TAKES):
        assert re.search(rf"\b{key}=", command.HELP)


def test_summary_of_one_example_per_class(images, run_folder):
    folder = run_folder("algo=protonet")
    items = [one for one in inputs.examples(str(images / "examples"), images) if "/0." in one.name]
    classifier = FewShotClassifier(run=folder, head="cosine")
    classifier.fit([one.value for one in items], [one.label for one in items])
    (line,) = report.summary(classifier, [])
    assert "cannot be known from one example per class" in line
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    (images / "small.png").write_bytes(buffer.getvalue())
    assert classifier.label([images / "small.png"])[0].unknown is None
