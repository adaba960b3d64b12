"""A user's own images: transparency, unreadable files, formats, channels; Model and weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from rich.console import Console

import metalearn
from metalearn.backbones.conv4 import Conv4
from metalearn.backbones.resnet18 import ResNet18
from metalearn.config import checking, components, composition
from metalearn.data.files import ink, list_images, open_image
from metalearn.data.images import with_channels
from metalearn.run import load
from metalearn.run.evaluate import evaluate
from metalearn.run.train import train
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.types import InputSpec

_SIZE = 16
_FOLDER = [
    "dataset=folder", f"dataset.image_size={_SIZE}", "dataset.fractions=[0.34,0.33,0.33]",
    "backbone.filters=8", "episode.way=2", "episode.query=3", "train.steps=2",
    "val.episodes=4", "test.episodes=6", "logger=none",
]  # fmt: skip


def dataset_of(path: Path, **changes):
    overrides = ["dataset=folder", f"dataset.path={path}", f"dataset.image_size={_SIZE}"]
    overrides += [f"dataset.{key}={value}" for key, value in changes.items()]
    settings = checking.check_config(composition.compose_config(overrides)).dataset
    return components.make(settings, "dataset")


def open_folder(path: Path, **changes):
    """Open a folder, with a cache next to it."""
    cache = path.parent / "cache"
    return dataset_of(path, **changes).open(path.parent, cache, torch.device("cpu"))


def images_of(data) -> torch.Tensor:
    return data.stores["train"].images


@pytest.fixture
def pictures(tmp_path):
    """Save six classes of four grey images each, all of one level per class."""
    for k in range(6):
        (tmp_path / f"pictures/class {k}").mkdir(parents=True)
        for i in range(4):
            Image.new("L", (20, 20), 40 * k + i).save(tmp_path / f"pictures/class {k}/{i}.png")
    return tmp_path / "pictures"


def drawing(mode: str) -> Image.Image:
    """Draw a black square on a transparent black background."""
    image = Image.new("RGBA", (_SIZE, _SIZE), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((4, 4, 11, 11), fill=(0, 0, 0, 255))
    if mode == "P":  # transparency of each palette entry, about which Pillow warns
        palette = Image.new("P", image.size, 0)
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.paste(1, (4, 4, 12, 12))
        palette.info["transparency"] = b"\x00\xff"
        return palette
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize(("background", "level"), [("white", 255), ("'#808080'", 128), ("none", 0)])
def test_transparent_parts_get_the_background(pictures, caplog, recwarn, mode, background, level):
    path = pictures / "class 0/0.png"
    drawing(mode).save(path)
    data = open_folder(pictures, background=background)
    image = images_of(data)[0]
    assert (image[:, 0, 0] == level).all() and (image[:, 8, 8] == 0).all()
    (line,) = caplog.messages
    assert "1 of 24 images have transparent parts" in line
    assert ("colours hidden there" if background == "none" else background.strip("'")) in line
    assert not recwarn.list
    caplog.clear()
    open_folder(pictures, background=background)  # from the cache
    assert caplog.messages == [line]


def test_opaque_images_with_an_alpha_channel_are_unchanged_and_not_reported(pictures, caplog):
    before = images_of(open_folder(pictures))
    path = pictures / "class 1/0.png"
    Image.open(path).convert("RGBA").save(path)
    assert torch.equal(images_of(open_folder(pictures)), before)
    assert not caplog.messages


def test_older_runs_keep_their_background_and_scale(pictures):
    stored = composition.compose_config([*_FOLDER, "algo=proto_maml", f"dataset.path={pictures}"])
    assert (stored.dataset.background, stored.algo.temperature) == ("white", None)
    del stored.dataset.background, stored.dataset.unreadable, stored.algo.temperature
    settings = checking.check_config(stored)
    assert (settings.dataset["background"], settings.dataset["unreadable"]) == ("none", "error")
    assert settings.algo["temperature"] == 1.0


def test_handwriting_on_transparent_paper_is_ink():
    assert (ink(drawing("RGBA"), _SIZE) == ink(drawing("P"), _SIZE)).all()
    assert ink(drawing("LA"), _SIZE)[0, 8, 8] == 255 and ink(drawing("LA"), _SIZE)[0, 0, 0] == 0


def test_a_background_that_is_no_colour_is_refused(pictures):
    with pytest.raises(UserError, match=r"dataset\.background=paper: should be a colour"):
        open_folder(pictures, background="paper")


def test_all_unreadable_files_are_listed_at_once(pictures):
    for i in range(13):
        (pictures / f"class 2/bad{i:02}.png").write_bytes(b"no image")
    with pytest.raises(UserError) as caught:
        open_folder(pictures)
    line = str(caught.value)
    assert "class 2/bad00.png is not a readable image" in line and "nor are 12 others" in line
    assert "class 2/bad10.png and 2 more" in line and "dataset.unreadable=skip" in line
    assert "bad11" not in line


def test_unreadable_files_can_be_left_out(pictures, caplog):
    expected = open_folder(pictures)
    (pictures / "class 2/bad.png").write_bytes(b"no image")
    (pictures / "class 4/bad.png").write_bytes(b"no image")
    (pictures / "only bad").mkdir()
    (pictures / "only bad/bad.png").write_bytes(b"no image")
    data = open_folder(pictures, unreadable="skip")
    assert data.content_hash == expected.content_hash
    assert "3 of 27 images cannot be read and are left out: class 2/bad.png" in caplog.text
    with pytest.raises(UserError, match="is not a readable image"):
        open_folder(pictures, unreadable="error")  # not from the cache of skip
    for path in pictures.rglob("[0-9].png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="nor are 26 others"):
        open_folder(pictures, unreadable="skip")


def test_only_raster_formats_are_images(pictures):
    before = len(list_images(pictures))
    for name in ("readme.pdf", "drawing.eps", "page.ps", "chart.wmf", "chart.emf", "notes.txt"):
        (pictures / "class 0" / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    assert len(list_images(pictures)) == before
    eps = pictures / "class 0/drawing.png"  # Pillow would give it to Ghostscript
    Image.new("RGB", (8, 8)).save(eps, "EPS")
    with pytest.raises(UserError, match=r"drawing\.png is not a readable image"):
        open_folder(pictures)
    for suffix in ("png", "jpg", "gif", "bmp", "tif", "webp", "ppm", "tga", "pcx", "jp2", "ico"):
        path = pictures.parent / f"image.{suffix}"
        Image.new("RGB", (16, 16), "red").save(path)
        with open_image(path) as image:
            assert image.size == (16, 16)
        assert list_images(pictures.parent)[0].name == path.name
        path.unlink()


def test_grey_and_colour_images_are_converted():
    colour = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    theirs = [Image.fromarray(x.permute(1, 2, 0).numpy()).convert("L") for x in colour]
    expected = torch.stack([torch.from_numpy(np.array(x))[None] for x in theirs])
    grey = with_channels(colour, 1)
    assert grey.dtype == torch.uint8 and (grey.int() - expected.int()).abs().max() <= 1
    torch.testing.assert_close(
        with_channels(colour / 255, 1) * 255, expected.float(), atol=1, rtol=0
    )
    assert torch.equal(with_channels(grey, 3), grey.repeat(1, 3, 1, 1))
    assert with_channels(colour, 3) is colour


@pytest.fixture
def trained(pictures, cache_dir):
    """Train a run for two steps on the pictures; return its folder."""

    def train_run(*overrides: str) -> Path:
        overrides = (*_FOLDER, f"dataset.path={pictures}", f"cache_dir={cache_dir}", *overrides)
        folder = pictures.parent / "run"
        train(composition.compose_config(list(overrides)), folder, "run", [], Console(quiet=True))
        return folder

    return train_run


@pytest.mark.parametrize("overrides", [["algo=protonet"], ["algo=maml", "statistics=support"]])
def test_predictions_in_chunks_are_those_of_all_at_once(trained, pictures, monkeypatch, overrides):
    model = metalearn.load(trained(*overrides))
    sizes: list[int] = []
    embed = Conv4.embed

    def recording(self, params, x, *rest, **options):
        sizes.append(len(x))
        return embed(self, params, x, *rest, **options)

    monkeypatch.setattr(Conv4, "embed", recording)
    files = model.files(pictures)
    model.adapt([files[0], files[5]], ["a", "b"])
    expected, features = model.probabilities(files), model.embed(files)
    assert max(sizes) == 24
    sizes.clear()
    monkeypatch.setattr(load, "_CHUNK", 5 * 3 * _SIZE**2)
    torch.testing.assert_close(model.probabilities(files), expected)
    torch.testing.assert_close(model.embed(files), features)
    assert max(sizes) == 5


def test_queries_that_depend_on_each_other_are_computed_together(trained, pictures, monkeypatch):
    folder = trained("algo=protonet")
    monkeypatch.setattr(load, "_CHUNK", 1)
    model = metalearn.load(folder, statistics="query")
    files = model.files(pictures)
    model.adapt(files[::4], range(6))
    together, alone = model.probabilities(files), model.probabilities(files[:1])
    assert not torch.allclose(together[:1], alone)
    monkeypatch.setattr(load, "_CHUNK", 10**9)
    assert torch.equal(model.probabilities(files), together)


def test_a_model_takes_folders_files_and_images_and_embeds_them(trained, pictures):
    model = metalearn.load(trained("algo=protonet"))
    (pictures / "class 3/notes.txt").write_text("not an image")
    files = model.files(pictures)
    assert files == sorted(pictures.rglob("*.png"))
    assert model.embed(files).shape == (24, 8)  # before adapt: population statistics
    model.adapt(files, [file.parent.name for file in files])
    labels = model.predict(pictures)
    assert len(labels) == 24 and set(labels) <= set(model.classes)
    assert model.predict(str(pictures / "class 2")) == labels[8:12]
    assert model.predict(files[8]) == model.predict(Image.open(files[8])) == labels[8:9]
    assert model.predict([Image.open(files[0]), files[8]]) == [labels[0], labels[8]]
    drawing("RGBA").save(pictures.parent / "clear.png")
    torch.testing.assert_close(
        model.inputs(pictures.parent / "clear.png"), model.inputs(drawing("RGBA"))
    )
    # Prototypes of the features are what the predictions come from.
    z = model.embed(files)
    means = z.unflatten(0, (6, 4)).mean(1)
    assert [model.classes[i] for i in torch.cdist(z, means).argmin(-1)] == labels
    assert model.predict([]) == [] and model.embed([]).shape == (0, 8)
    assert model.probabilities(np.zeros((0, 3, _SIZE, _SIZE), np.uint8)).shape == (0, 6)
    (pictures / "empty").mkdir()
    for folder in (pictures / "empty", pictures / "nowhere", files[0]):
        with pytest.raises(UserError, match="is not a folder with images"):
            model.files(folder)


def test_features_under_support_statistics_need_the_support_set(trained, pictures):
    model = metalearn.load(trained("algo=maml", "statistics=support"))
    files = model.files(pictures)
    with pytest.raises(UserError, match="call adapt"):
        model.embed(files)
    model.adapt([files[0], files[5]], ["a", "b"])
    torch.testing.assert_close(model.embed(files)[:2], model.embed(files[:2]))


@pytest.mark.parametrize(("colour", "other"), [("rgb", "L"), ("grey", "RGB")])
def test_grey_and_colour_arrays_are_accepted_by_any_run(trained, pictures, colour, other):
    model = metalearn.load(trained("algo=protonet", f"dataset.colour={colour}"))
    images = [Image.open(file).convert(other) for file in model.files(pictures)]
    arrays = np.stack([np.array(image).reshape(_SIZE + 4, _SIZE + 4, -1) for image in images])
    arrays = arrays.transpose(0, 3, 1, 2)[:, :, 2:-2, 2:-2]
    torch.testing.assert_close(model.inputs(arrays), model.inputs(pictures), atol=0.01, rtol=0.01)
    torch.testing.assert_close(model.inputs(arrays / 255), model.inputs(arrays))


@pytest.mark.parametrize(("colour", "other"), [("rgb", "grey"), ("grey", "rgb")])
def test_a_run_is_tested_on_images_of_other_channels(trained, colour, other):
    folder = trained("algo=protonet", f"dataset.colour={colour}")
    evaluate(folder, [f"dataset.colour={other}"], "test", None, Console(quiet=True))
    own = (folder / "test_scores.csv").read_text()
    # The images are grey, so both hold the same information.
    assert any(path.read_text() == own for path in (folder / "evaluations").glob("*_scores.csv"))


@pytest.mark.slow
def test_common_forms_of_weights_files_load_and_a_module_is_explained(tmp_path):
    import torchvision  # slow to import

    net = torchvision.models.resnet18()
    plain = net.state_dict()
    forms = {
        "module": {f"module.{name}": value for name, value in plain.items()},
        "nested": {"epoch": 3, "state_dict": plain},
        "both": {"model": {f"backbone.net.{name}": value for name, value in plain.items()}},
    }
    for name, content in forms.items():
        path = tmp_path / f"{name}.pth"
        torch.save(content, path)
        params, population = ResNet18(weights=str(path), frozen=False, eps=1e-5).init(
            InputSpec((3, 32, 32)), prng.key_of(0)
        )
        assert torch.equal(params["conv_stem.weight"], plain["conv1.weight"])
        assert torch.equal(population["norm_stem.var"], plain["bn1.running_var"])
    torch.save(net, tmp_path / "module.pth")
    with pytest.raises(UserError) as caught:
        ResNet18(weights=str(tmp_path / "module.pth"), frozen=False, eps=1e-5).init(
            InputSpec((3, 32, 32)), prng.key_of(0)
        )
    assert "contains other objects than tensors" in str(caught.value)
    assert "weights_only" not in str(caught.value) and "x1b" not in str(caught.value)
