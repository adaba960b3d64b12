"""Tests on datasets that a run was not trained on: their inputs, and overlap with training."""

import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from metalearn.cli import evaluate as cli
from metalearn.config import composition
from metalearn.data.classes import ClassData
from metalearn.data.files import decode, list_images
from metalearn.report.folder import RunFolder
from metalearn.report.stats import base_and_novel
from metalearn.run import checkpoint
from metalearn.run.evaluate import evaluate, evaluate_several
from metalearn.run.request import Request
from metalearn.run.train import train
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.store import ClassIndex, MixedClasses

_NAMES = [f"class{number}" for number in range(12)]


def write_images(folder, classes, seed=0, suffix=".png", mode="RGB", **options):
    """Write 6 images of each class, a function of seed and class."""
    for name in classes:
        (folder / name).mkdir(parents=True)
        random = np.random.default_rng([seed, *name.encode()])
        for number in range(6):
            pixels = random.integers(0, 256, (20, 23), dtype=np.uint8)
            image = Image.fromarray(pixels).convert(mode)
            image.save(folder / name / f"{number}{suffix}", **options)
    return folder


def hashes_of(folder):
    return decode(list_images(folder), lambda image: np.zeros((1, 1, 1), np.uint8)).hashes


@pytest.fixture
def console():
    return Console(width=200, record=True)


@pytest.fixture
def run(console, tmp_path):
    """Train on the first 4 of 12 classes of a folder; the next 4 are for validation."""
    source = write_images(tmp_path / "own", _NAMES)
    split = {"train": _NAMES[:4], "val": _NAMES[4:8], "test": _NAMES[8:]}
    (tmp_path / "split.json").write_text(json.dumps(split))

    def make(*overrides, name="run"):
        words = [
            "algo=protonet", "dataset=folder", f"dataset.path={source}", "dataset.image_size=16",
            f"dataset.split={tmp_path}/split.json", f"cache_dir={tmp_path}/cache",
            "episode.way=2", "episode.query=2", "backbone.filters=8", "train.steps=1",
            "val.episodes=2", "test.episodes=3", "logger=none", *overrides,
        ]  # fmt: skip
        train(composition.compose_config(words), tmp_path / name, "protonet", words, console)
        return tmp_path / name

    return make


def test_hash_is_of_the_pixels_of_the_file_in_any_lossless_format(tmp_path):
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        (".png", "RGB", {}), (".bmp", "L", {}), (".tiff", "RGB", {"compression": "tiff_lzw"}),
        (".webp", "RGB", {"lossless": True}), (".png", "RGBA", {}),
    ]  # fmt: skip
    first, *others = (
        hashes_of(write_images(tmp_path / str(number), ["a"], 0, suffix, mode, **options))
        for number, (suffix, mode, options) in enumerate(kinds)
    )
    assert all(torch.equal(one, first) for one in others)
    black = np.zeros((2, 8), np.uint8)
    Image.fromarray(black).save(tmp_path / "0/a/wide.png")
    Image.fromarray(black.T.copy()).save(tmp_path / "0/a/tall.png")
    write_images(tmp_path / "0", ["b"], seed=1)
    assert len(hashes_of(tmp_path / "0").unique()) == 6 + 2 + 6


@pytest.mark.slow
def test_overlap_is_found_by_content_refused_and_with_permission_recorded(run, console, tmp_path):
    folder = run()
    # The same images in another format under other names: 2 trained classes, 1 validated, 2 new.
    other = tmp_path / "other"
    for number, name in enumerate([_NAMES[0], _NAMES[3], _NAMES[6]]):
        write_images(tmp_path / "copy", [name], suffix=".bmp")
        shutil.move(tmp_path / "copy" / name, other / f"copy{number}")
    write_images(other, ["new0", "new1"], seed=1)
    (other / "copy1" / "0.bmp").unlink()
    shutil.copy(other / "copy0" / "1.bmp", other / "new0" / "again.bmp")  # a single shared image
    words = ["dataset=folder", f"dataset.path={other}"]
    with pytest.raises(UserError) as error:
        evaluate(folder, words, "all", None, console)
    text = str(error.value)
    assert "dataset: 18 of 30 examples were trained or validated on, in 4 of 5 classes" in text
    assert "trained: all of 2: copy0, copy1 and 1 examples of new0" in text
    assert "validated: all of 1: copy2" in text and "test.overlap=allow" in text
    allowed = evaluate(folder, [*words, "test.overlap=allow"], "all", None, console)
    expected = {"trained": {"copy0": 6, "copy1": 5, "new0": 1}, "validated": {"copy2": 6}}
    assert "test.overlap=allow: 18 of 30 examples" in console.export_text()
    assert [result["overlap"] for result in allowed["results"]] == [expected, expected]
    # Without training steps, or with new classes only, there is no overlap.
    untrained = run("train.steps=0", name="untrained")
    write_images(tmp_path / "new", ["new0", "new1", "new2"], seed=1)
    for own, path in ((untrained, other), (folder, tmp_path / "new")):
        tested = evaluate_several([own], [f"{path}:all"], [], "test", console)
        assert not tested["failures"] and "overlap" not in tested["results"][0]
    # Such a run may be tested on all classes of its own dataset, too.
    everything = evaluate(untrained, [], "all", None, console)["results"][0]
    assert everything["protocol"]["num_classes"] == 12 and "overlap" not in everything
    # Its own training classes are tested on purpose, those of a different split are not.
    evaluate(folder, ["dataset.store=device"], "train", None, console)
    for split in ("train", "val", "test"):
        with pytest.raises(UserError, match="were trained or validated on"):
            evaluate(folder, ["dataset.split=random"], split, None, console)
    # The check needs the run's own data.
    (tmp_path / "own").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="cannot be checked without its own data"):
        evaluate(folder, ["dataset=folder", f"dataset.path={tmp_path}/new"], "all", None, console)
    # Its own test does not: the data are the same, from another folder.
    evaluate(folder, [f"dataset.path={tmp_path}/moved"], "test", None, console)


@pytest.mark.slow
def test_examples_of_the_run_that_weights_started_from_count_as_trained(run, console, tmp_path):
    start = f"train.start={run()}"
    with pytest.raises(UserError, match=r"train\.start: .* were trained or validated on"):
        run(start, "dataset.split=random", name="shuffled")
    words = [f"dataset.path={write_images(tmp_path / 'new', _NAMES, seed=1)}"]
    second = run(start, *words, name="second")
    for split, count in (("test", 0), ("all", 48)):
        asked = [
            "dataset=folder",
            f"dataset.path={tmp_path}/own",
            f"dataset.split={tmp_path}/split.json",
        ]
        request = Request.of(second, [*asked, "test.overlap=allow"], split)
        counts = request.overlap.counts.values() if request.overlap else []
        assert sum(sum(each.values()) for each in counts) == count
    # Without the first run, the second one is resumed, and tested on its own data only.
    (tmp_path / "run").rename(tmp_path / "gone")
    (second / "result.json").unlink()
    run(start, *words, "resume=auto", name="second")
    evaluate(second, [], "test", None, console)
    with pytest.raises(UserError, match=rf"train\.start: .*{tmp_path}/run"):
        evaluate(second, asked, "test", None, console)


def test_images_get_size_channels_and_normalisation_of_the_run(run, console, tmp_path):
    folder = run("dataset.colour=grey")
    other = write_images(tmp_path / "other", _NAMES[:4], seed=1)  # in colour, 20x23
    request = Request.of(folder, ["dataset=folder", f"dataset.path={other}"], "all")
    tested = request.run("population")
    trained = checkpoint.load(RunFolder(folder).best, torch.device("cpu"))["standardisation"]
    assert tested.spec.input_shape == (1, 16, 16) and tested.standardisation == trained
    assert "dataset.image_size=16" in request.overrides
    assert isinstance(tested.data, ClassData)
    store: Any = tested.data.stores["all"]
    x = (store.images[:3] / 255 - trained["shift"][0]) * trained["scale"][0]
    torch.testing.assert_close(store.gather(torch.arange(3), torch.tensor(0)), x)


@pytest.mark.slow
def test_several_runs_and_datasets_give_one_table(run, console, tmp_path):
    folders = [run(), run("train.steps=0", "episode.way=4", name="wide")]
    other = write_images(tmp_path / "few", ["x", "y", "z"], seed=1)
    capture = Console(width=200, record=True)
    words = [f"{other}:all", f"{tmp_path}/own"]
    tested = evaluate_several(folders, words, ["episode.query=3"], "test", capture)
    # The wide run is tested with all three classes; only the untrained run may see the
    # classes of another split of its data.
    assert [result["protocol"]["way"] for result in tested["results"]] == [2, 3, 2]
    ((failure),) = tested["failures"]
    assert failure["run"] == str(folders[0]) and "were trained or validated on" in failure["reason"]
    lines = capture.export_text().splitlines()
    (heading,) = (line for line in lines if "protocol" in line)
    assert heading.split() == [
        "dataset", "run", "split", "classes", "episode", "statistics", "score", "protocol",
    ]  # fmt: skip
    assert sum("±" in line for line in lines) == 3
    for file, result in zip(tested["files"], tested["results"], strict=True):
        with open(file) as stream:
            assert json.load(stream) == result
    with pytest.raises(UserError, match=r"way=5, but the split has only 3 classes"):
        evaluate_several(folders, [f"{other}:all"], ["episode.way=5"], "test", capture)
    with pytest.raises(UserError, match=r"path=/nowhere: no folder or zip"):
        evaluate_several(folders, ["/nowhere"], [], "test", capture)


@pytest.mark.slow
def test_training_tests_on_other_datasets_too(run, console, tmp_path):
    other = write_images(tmp_path / "few", ["x", "y", "z"], seed=1)
    write_images(tmp_path / "more", ["v", "w"], seed=2)
    write_images(tmp_path / "more", ["u"], seed=3)
    folder = run(f"test_dataset=[{other}:all,{tmp_path}/more:all]")
    evaluations = [
        json.loads(file.read_text()) for file in sorted((folder / "evaluations").glob("*.json"))
    ]
    assert [one["protocol"]["num_classes"] for one in evaluations] == [3, 3]
    assert len({one["protocol"]["data"] for one in evaluations}) == 2
    # Impossible tests are refused before anything is written.
    for word, reason in (
        (f"{tmp_path}/own:all", "were trained or validated on"),
        ("sinusoid", "the run learned classes, but this dataset has values"),
        ("glyfs", "there is no such dataset"),
    ):
        with pytest.raises(UserError, match=f"test_dataset={word}: .*{reason}"):
            run(f"test_dataset={word}", name="impossible")
    assert not (tmp_path / "impossible").exists()


def test_mixed_episodes_have_base_and_novel_classes():
    rows = torch.arange(60).view(10, 6)
    index = ClassIndex(rows, torch.full((10,), 6), tuple("abcdefghij"))
    view = MixedClasses(index, num_base=7)
    assert view.max_way == 6  # three novel classes
    for way, base in ((2, 1), (5, 2), (6, 3)):
        classes, rotations = view.choose(prng.fold_in(prng.key_of(3), torch.arange(400)), way)
        assert rotations is None and all(len(set(row)) == way for row in classes.tolist())
        assert ((classes < 7).sum(1) == base).all()
        # Each class is as frequent as the others of its kind; no position tells the kind.
        counts = torch.bincount(classes.flatten(), minlength=10) / 400
        expected = torch.tensor([base / 7] * 7 + [(way - base) / 3] * 3)
        torch.testing.assert_close(counts, expected, rtol=0, atol=0.11)
        share = (classes < 7).float().mean(0)
        torch.testing.assert_close(share, torch.full_like(share, base / way), rtol=0, atol=0.1)


def test_base_and_novel_accuracy_by_hand():
    correct = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 1, 1, 1]], dtype=torch.bool)
    classes = torch.tensor([[0, 1, 2, 3, 4], [0, 2, 5, 4, 3]])
    base, novel, both = base_and_novel(correct, classes, 3)
    torch.testing.assert_close(base, torch.tensor([2 / 3, 0]).double())
    torch.testing.assert_close(novel, torch.tensor([1 / 2, 1]).double())
    torch.testing.assert_close(both, torch.tensor([4 / 7, 0]).double())
    # The second episode has fewer queries.
    padded = torch.tensor([[0, 1, 2, 3, 4, 4], [0, 2, 5, 4, 3, -1]])
    more = torch.cat([correct.long(), torch.tensor([[0], [-1]])], 1)
    base, novel, both = base_and_novel(more, padded, 3)
    torch.testing.assert_close(novel, torch.tensor([1 / 3, 1]).double())


def test_base_and_novel_classes_are_reported_apart(run, tmp_path):
    folder = run()
    capture = Console(width=200, record=True)
    words = ["episode.way=4", "test.episodes=20"]
    (result, *_) = evaluate(folder, words, "train+test", None, capture)["results"]
    own = result["details"]["generalised"]
    assert own["base_images_were_trained_on"] and result["split"] == "train+test"
    assert (result["protocol"]["num_classes"], result["protocol"]["base_classes"]) == (8, 4)
    # As many base as novel queries: the accuracy is the mean of both.
    mean = (own["base"]["mean"] + own["novel"]["mean"]) / 2
    assert result["test"]["accuracy"]["mean"] == pytest.approx(mean)
    assert own["harmonic_mean"]["mean"] <= mean
    text = " ".join(capture.export_text().split())
    assert "harmonic mean" in text and "images of base classes were seen in training" in text
    for overrides, reason in (
        (["dataset.split=random"], "requires the run's own dataset"),
        (["episode.distractors=1", "episode.unlabelled=1"], "set episode.distractors=0"),
        (["dataset.rotations=episode"], "requires dataset.rotations=none"),
    ):
        with pytest.raises(UserError, match=reason):
            evaluate(folder, overrides, "train+test", None, capture)


@pytest.mark.slow
def test_command_takes_lists_of_folders_and_datasets(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run()
    run("train.steps=0", name="untrained")
    for name in ("few", "a,b"):
        write_images(tmp_path / name, ["x", "y", "z"], seed=1)
    words = ["run", "untrained", "dataset=few:all,own", "test.episodes=2"]
    capsys.readouterr()
    assert cli.main([*words, "--json"]) == 1  # one of four tests is refused
    content = json.loads(capsys.readouterr().out)
    assert [result["protocol"]["num_classes"] for result in content["results"]] == [3, 3, 2]
    ((failure),) = content["failures"]
    assert (failure["run"], failure["dataset"]) == ("run", "own")
    assert cli.main(["run=run,untrained", "dataset=a,b:all", "test.episodes=2"]) == 0
    assert cli.main(["run", "dataset=a,b:all", "test.episodes=2"]) == 0  # a single one, in detail
    assert "worst tenth" in capsys.readouterr().out
    for given, reason in (
        (["run", "untrained", "curve=shot"], "curve: takes one run and one dataset"),
        (["run", "dataset="], "dataset=: should be one or several names or folders"),
        (["run", "dataset=nowhere/x"], "path=nowhere/x: no folder or zip"),
        (["run", "dataset=own:tets"], "there is no such dataset"),
    ):
        with pytest.raises(UserError, match=reason):
            cli.main(given)
