"""`metalearn data`: what it says about each kind of dataset, and its contact sheets."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from metalearn.cli import data
from metalearn.config import choices, composition, plugins
from metalearn.data.base import Dataset
from metalearn.report.sheets import draw_sheet
from metalearn.system.errors import UserError
from tests.fixtures import SMALL

_GLYPHS = ["glyphs", *(word for word in SMALL if word.startswith("dataset.")), "episode.query=3"]


@pytest.fixture
def run(monkeypatch, tmp_path, cache_dir, capsys):
    """Run the command; return what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METALEARN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("METALEARN_CACHE", str(cache_dir))

    def command(*words: object) -> str:
        assert data.main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    return command


def test_all_datasets_are_listed_with_how_to_get_them(run, tmp_path):
    (tmp_path / "data/cub/images/a").mkdir(parents=True)
    (tmp_path / "data/miniimagenet/splits").mkdir(parents=True)
    (tmp_path / "data/miniimagenet/splits/train.csv").write_text("filename,label\n")
    text = run()
    known = {one["dataset"]: one for one in json.loads(run("--json"))["datasets"]}
    assert list(known) == sorted(choices.options("dataset"))
    for name, one in known.items():
        assert name in text and one["state"] in text
        assert one["description"].endswith("."), name  # one whole sentence, from one line
        has_origin = bool(one["source"] and one["licence"])
        own = ("folder", "text", "features", "user_values", "user_classes")
        assert has_origin or name in own, name
    assert known["cub"]["state"] == known["cifar10"]["state"] == "downloaded when first used"
    assert known["glyphs"]["state"] == "needs no files"
    assert known["miniimagenet"]["state"] == "by hand"  # lists are not images
    assert f"bring to {tmp_path}/data/miniimagenet: class folders" in text
    (tmp_path / "data/cub/images/a/1.jpg").write_bytes(b"")
    again = {one["dataset"]: one for one in json.loads(run("--json"))["datasets"]}
    assert again["cub"]["state"] == "present"


def test_files_of_datasets_are_read_as_a_run_reads_them():
    for name in ("fc100", "cifar10", "clinc150", "glyphs"):
        composed = composition.compose_config([f"dataset={name}"]).dataset
        assert choices.stored_values("dataset", name) == composed
    with pytest.raises(UserError, match="there is no such dataset"):
        choices.stored_values("dataset", "nothing")


def test_images_become_contact_sheets_that_are_not_replaced(run, tmp_path):
    document = json.loads(run(*_GLYPHS, "out=sheets", "--json"))
    assert document["splits"]["train"]["classes"] == 39
    assert document["splits"]["train"]["classes_with_rotations"] == 156
    assert document["splits"]["test"]["examples"] == 20 * document["splits"]["test"]["classes"]
    assert document["sheets"] == [f"sheets/{n}.png" for n in ("train", "val", "test", "episode")]
    for path in document["sheets"]:
        with Image.open(tmp_path / path) as image:
            assert image.format == "PNG" and 200 < image.width <= 900
            levels = np.asarray(image.convert("L"))
            assert (levels < 100).any() and (levels > 200).mean() > 0.5  # dark ink on paper
    with pytest.raises(UserError, match=r"out=sheets: sheets/train\.png exists; remove it"):
        run(*_GLYPHS, "out=sheets")
    text = run(*_GLYPHS)
    assert "licence: MIT" in text and "train: 39 classes (156 with rotations)" in text
    assert len(list((tmp_path / "outputs/data/glyphs").glob("*/episode.png"))) == 1


def test_an_impossible_episode_is_said_and_the_rest_is_shown(run, tmp_path):
    for name in "abc":
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (9, 9), "red").save(tmp_path / "photos" / name / f"{number}.png")
    fractions = "dataset.fractions=[0.34,0.33,0.33]"
    text = run("folder", "dataset.path=photos", fractions, "out=one")
    assert "no episode: test episodes: way=5, but the split has only 1 class; add" in text
    assert "val: 1 class, 3 examples" in text and not (tmp_path / "one/episode.png").exists()
    words = ["folder", "dataset.path=photos", fractions, "split=all", "out=two", "--json"]
    document = json.loads(run(*words, "episode.way=3", "episode.query=2"))
    assert document["splits"]["all"]["names"] == ["a", "b", "c"]
    assert "two/episode.png" in document["sheets"] and "two/all.png" in document["sheets"]
    with Image.open(tmp_path / "two/episode.png") as image:  # standardisation is undone
        colours = {colour for _, colour in image.convert("RGB").getcolors(9999)}
    assert (255, 0, 0) in colours


def test_texts_are_printed(run, tmp_path):
    rows = [
        f"{word} number {n},kind {word}" for word in ("one", "two", "six", "ten") for n in "abc"
    ]
    (tmp_path / "texts.csv").write_text("text,label\n" + "\n".join(rows))
    words = ["text", "dataset.path=texts.csv", "dataset.fractions=[0.5,0.25,0.25]", "split=train"]
    words += ["episode.way=2", "episode.query=1"]
    text = run(*words)
    assert "inputs: texts" in text and "train: 2 classes, 6 examples, 3 of each class" in text
    samples = json.loads(run(*words, "--json"))["samples"]
    for row in [*samples["train"], *samples["test"], *samples["episode"]]:
        for examples in row["examples"].values():
            for one in examples:
                assert f"{one},{row['class']}" in rows
                assert one in text
    assert {part for row in samples["episode"] for part in row["examples"]} == {"support", "query"}


def test_vectors_and_functions_are_described(run, tmp_path):
    text = run("gaussians")
    assert "inputs: features, 16" in text and "val: 20 classes, 400 examples" in text
    assert not (tmp_path / "outputs").exists()
    text = run("sinusoid")
    assert "no classes: Sinusoids with random amplitude" in text
    assert "A task has 10 support examples and 10 queries, with inputs of shape [1]" in text


def test_datasets_of_plugins_are_described(run, monkeypatch):
    monkeypatch.setattr(plugins, "_named", ["tests.toys"])
    assert "goals needs no files: Goals on a line, for control." in " ".join(run().split())
    assert "no classes: Goals on both sides" in run("goals")
    text = run("sentences")
    assert "licence: not stated" in text and "inputs: tokens" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "dataset=nothing: there is no such dataset"),
        (["glyphs", "omniglot"], "takes the name of one dataset"),
        (["glyphs", "split=tset"], "split=tset: should be train, val, test or all"),
        (["sinusoid", "split=all"], "this dataset has no classes"),
        (["episode.way=3"], "episode.way=3: name a dataset"),
        (["glyphs", "--sheet"], "--sheet: there is no such option"),
        (["glyphs", "dataset.num_clases=3"], "did you mean dataset.num_classes"),
        (["miniimagenet"], "no folder or zip .* bring there class folders"),
    ],
)
def test_wrong_words_are_refused(words, message, run):
    with pytest.raises(UserError, match=message):
        run(*words)


def test_a_sheet_fits_labels_and_images_of_any_size(tmp_path):
    for shape in ((1, 5, 9), (3, 300, 200)):
        rows = [
            ("a very long name of a class, " * 3 + str(n), [[torch.rand(shape)] * 9] * 2)
            for n in range(3)
        ]
        draw_sheet(tmp_path / "a.png", "title", rows, ["support", "query"])
        with Image.open(tmp_path / "a.png") as image:
            assert image.width <= 900 and image.height < 400


def test_datasets_have_no_origin_by_default():
    assert (Dataset().source, Dataset().licence, Dataset().addresses) == ("", "", [])
    assert repr(Dataset(source="x")) == "Dataset()"  # hashes of generated data do not change
