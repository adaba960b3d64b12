"""From files to episodes: formats, splits, caches, downloads and their errors."""

import hashlib
import io
import json
import os
import socketserver
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metalearn.config import checking, components, composition
from metalearn.data.glyphs import Glyphs
from metalearn.data.omniglot import vinyals_split
from metalearn.system import download
from metalearn.system.errors import UserError
from metalearn.tasks.sampling import Shape

_CPU = torch.device("cpu")
_SHARED = Path(
    os.environ.get("METALEARN_DATA", Path(__file__).parent.parent.parent / "shared/data")
)
needs_omniglot = pytest.mark.skipif(
    not (_SHARED / "omniglot/images_background.zip").exists(),
    reason="real Omniglot is not in METALEARN_DATA",
)


def open_dataset(name: str, data_dir: Path, cache_dir: Path, **changes):
    settings = checking.check_config(
        composition.compose_config(
            [f"dataset={name}", *(f"dataset.{k}={v}" for k, v in changes.items())]
        )
    ).dataset
    return components.make(settings, "dataset").open(data_dir, cache_dir, _CPU)


def solid_image(level: int, mode: str, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.full((size[1], size[0]), level, np.uint8)).convert(mode)


@pytest.fixture
def image_data(tmp_path):
    """Save ten classes of 4 to 13 images of mixed formats; class k has grey level 20 k."""
    kinds = [
        ("RGB", "jpg", (40, 30)),
        ("L", "png", (21, 50)),
        ("RGBA", "png", (32, 32)),
        ("P", "gif", (64, 64)),
        ("1", "bmp", (9, 9)),
    ]
    for k in range(10):
        folder = tmp_path / "data/pictures" / f"class {k}é"
        folder.mkdir(parents=True)
        for i in range(4 + k):
            mode, suffix, size = kinds[i % len(kinds)]
            solid_image(20 * k, mode, size).save(folder / f"{i}.{suffix}")
    (tmp_path / "data/pictures/class 0é/notes.txt").write_text("not an image")
    return tmp_path / "data"


@pytest.mark.slow
@pytest.mark.parametrize("colour", ["rgb", "grey"])
def test_folder_of_mixed_images(image_data, tmp_path, colour):
    data = open_dataset(
        "folder", image_data, tmp_path / "c", colour=colour, image_size=16, standardise=False
    )
    assert data.inputs.shape == ((3 if colour == "rgb" else 1), 16, 16)
    assert [data.num_classes(split) for split in ("train", "val", "test")] == [6, 2, 2]
    task = data.episodes("train", Shape(5, 1, 3), 0).draw(0, 4)
    # An image's level identifies its class, except in 1-bit images; a palette is a few levels off.
    for t in range(4):
        for y in range(5):
            levels = task.query.x[t][task.query.y[t] == y].mean((1, 2, 3))
            levels = levels[(levels > 0.01) & (levels < 0.99)]
            assert len(levels) == 0 or levels.max() - levels.min() < 0.035


def test_zip_and_folder_give_the_same_data(image_data, tmp_path):
    with zipfile.ZipFile(tmp_path / "data/zipped.zip", "w") as archive:
        for path in (image_data / "pictures").rglob("*.*"):
            archive.write(path, path.relative_to(image_data))
    folder = open_dataset("folder", image_data, tmp_path / "c")
    zipped = open_dataset("folder", image_data, tmp_path / "c", path="zipped.zip")
    assert folder.content_hash == zipped.content_hash


@pytest.mark.slow
def test_split_file_is_followed_and_validated(image_data, tmp_path):
    names = [f"class {k}é" for k in range(10)]
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": names[:5], "val": names[5:7], "test": names[7:]}))
    data = open_dataset("folder", image_data, tmp_path / "c", split=path)
    assert [data.num_classes(split) for split in ("train", "val", "test")] == [5, 2, 3]
    path.write_text(json.dumps({"train": names[:5], "val": names[4:7], "test": names[7:]}))
    with pytest.raises(UserError, match="'class 4é' in both train and val"):
        open_dataset("folder", image_data, tmp_path / "c", split=path)
    path.write_text(
        json.dumps({"train": [names[0], names[0]], "val": names[4:7], "test": names[7:]})
    )
    with pytest.raises(UserError, match="'class 0é' twice in train"):
        open_dataset("folder", image_data, tmp_path / "c", split=path)
    path.write_text(json.dumps({"train": 5, "val": names[4:7], "test": names[7:]}))
    with pytest.raises(UserError, match="should be JSON"):
        open_dataset("folder", image_data, tmp_path / "c", split=path)
    path.write_text(json.dumps({"train": ["ghost"], "val": names[4:7], "test": names[7:]}))
    with pytest.raises(UserError, match="'ghost'"):
        open_dataset("folder", image_data, tmp_path / "c", split=path)
    with pytest.raises(UserError, match=r"nowhere\.json"):
        open_dataset("folder", image_data, tmp_path / "c", split="nowhere.json")


def test_error_names_the_corrupt_image_or_archive(image_data, tmp_path):
    (image_data / "pictures/class 3é/0.jpg").write_bytes(b"\xff\xd8 truncated")
    with pytest.raises(UserError, match=r"class 3é/0\.jpg"):
        open_dataset("folder", image_data, tmp_path / "c")
    (image_data / "broken.zip").write_bytes(b"PK no zip")
    with pytest.raises(UserError, match=r"broken\.zip"):
        open_dataset("folder", image_data, tmp_path / "c", path="broken.zip")


def test_classes_in_zips_and_folders_are_merged_and_duplicates_refused(image_data, tmp_path):
    root = image_data / "pictures"
    with zipfile.ZipFile(root / "more.zip", "w") as archive:
        for i in range(5):
            stream = io.BytesIO()
            solid_image(9, "L", (8, 8)).save(stream, "png")
            archive.writestr(f"zipped class/{i}.png", stream.getvalue())
    data = open_dataset("folder", image_data, tmp_path / "c")
    assert sum(data.num_classes(split) for split in ("train", "val", "test")) == 11
    (root / "nested/class 1é").mkdir(parents=True)
    solid_image(9, "L", (8, 8)).save(root / "nested/class 1é/x.png")
    with pytest.raises(UserError, match="two folders for class 'class 1é'"):
        open_dataset("folder", image_data, tmp_path / "c")


def test_16_bit_images_keep_their_levels(image_data, tmp_path):
    for path in (image_data / "pictures").rglob("*.*"):
        if path.suffix != ".txt":
            path.unlink()
            Image.fromarray(np.full((9, 9), 100 * 256, np.uint16)).save(path.with_suffix(".png"))
    data = open_dataset("folder", image_data, tmp_path / "c", standardise=False, colour="grey")
    x = data.episodes("train", Shape(2, 1, 1), 0).draw(0, 1).query.x
    torch.testing.assert_close(x, torch.full_like(x, 100 / 255))


@pytest.mark.slow
def test_cache_is_reused_and_rebuilt_if_corrupt_or_stale(image_data, tmp_path):
    cache = tmp_path / "c"
    first = open_dataset("folder", image_data, cache)
    (cache_file,) = cache.glob("*.pt")
    mtime = cache_file.stat().st_mtime_ns
    assert open_dataset("folder", image_data, cache).content_hash == first.content_hash
    assert cache_file.stat().st_mtime_ns == mtime
    cache_file.write_bytes(cache_file.read_bytes()[:100])  # truncated
    assert open_dataset("folder", image_data, cache).content_hash == first.content_hash
    solid_image(255, "L", (8, 8)).save(image_data / "pictures/class 1é/more.png")
    assert open_dataset("folder", image_data, cache).content_hash != first.content_hash


def test_standardised_training_images_have_mean_0_and_standard_deviation_1(image_data, tmp_path):
    data = open_dataset("folder", image_data, tmp_path / "c")
    index = data.views["train"].index
    rows = torch.cat([row[:count] for row, count in zip(index.rows, index.counts, strict=True)])
    x = data.stores["train"].gather(rows[None], torch.zeros(1, dtype=torch.int64))[0]
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


@pytest.mark.slow
def test_glyphs_are_deterministic_and_classes_differ(tmp_path):
    settings = checking.check_config(composition.compose_config(["dataset=glyphs"])).dataset
    assert settings["num_classes"] >= 1000
    small = {key: value for key, value in settings.items() if key != "_target_"} | {
        "num_classes": 60
    }
    first = Glyphs(**small)._render().images
    assert torch.equal(first, Glyphs(**small)._render().images)
    images = first.view(60, 20, -1).float()
    within = (images[:, 0] - images[:, 1]).square().sum(-1).mean()
    between = (images[:-1, 0] - images[1:, 0]).square().sum(-1).mean()
    assert within < 0.8 * between
    assert (images > 0).any(-1).all()  # no empty image


def test_vinyals_split_is_the_published_one():
    splits = vinyals_split()
    assert [len(splits[split]) for split in ("train", "val", "test")] == [1028, 172, 423]
    assert len({name for names in splits.values() for name in names}) == 1623


@needs_omniglot
@pytest.mark.slow
def test_omniglot_has_the_published_classes(tmp_path):
    data = open_dataset("omniglot", _SHARED, tmp_path)
    assert [data.num_classes(split) for split in ("train", "val", "test")] == [4112, 172, 423]
    task = data.episodes("test", Shape(20, 5, 15), 0).draw(0, 2)
    assert 0.02 < task.query.x.mean() < 0.2  # ink is 1, and there is little of it
    all_rotated = open_dataset("omniglot", _SHARED, tmp_path, rotations="classes")
    assert [all_rotated.num_classes(split) for split in ("train", "val", "test")] == [
        4112,
        688,
        1692,
    ]
    split = open_dataset("omniglot", _SHARED, tmp_path, split="random")
    assert [
        split.num_classes(name) // (4 if name == "train" else 1)
        for name in ("train", "val", "test")
    ] == [1100, 100, 423]
    alphabets = open_dataset("omniglot", _SHARED, tmp_path, split="alphabet").views
    sets = {
        name: {cls.split("/")[0] for cls in view.index.names} for name, view in alphabets.items()
    }
    assert [len(sets[name]) for name in ("train", "val", "test")] == [30, 5, 15]
    assert not (
        sets["train"] & sets["val"] | sets["train"] & sets["test"] | sets["val"] & sets["test"]
    )


def omniglot_archives(characters: dict[str, int]) -> dict[str, bytes]:
    """Make two archives in Omniglot's layout with the given number of images per character."""
    stream = io.BytesIO()
    solid_image(255, "1", (105, 105)).save(stream, "png")
    archives = {}
    for part, names in (
        ("images_background", list(characters)[:3]),
        ("images_evaluation", list(characters)[3:]),
    ):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name in names:
                for number in range(characters[name]):
                    archive.writestr(f"{part}/{name}/{number:04}.png", stream.getvalue())
        archives[part] = buffer.getvalue()
    return archives


@pytest.fixture
def six_characters(monkeypatch):
    """Reduce Omniglot to six characters."""
    splits = {"train": ["A/1", "A/2"], "val": ["A/3", "B/1"], "test": ["B/2", "B/3"]}
    monkeypatch.setattr("metalearn.data.omniglot.vinyals_split", lambda: splits)
    return dict.fromkeys(("A/1", "A/2", "A/3", "B/1", "B/2", "B/3"), 20)


def open_served_omniglot(address: str, content: dict[str, bytes], data_dir: Path, cache: Path):
    sums = {part: hashlib.md5(data).hexdigest() for part, data in content.items()}
    return open_dataset(
        "omniglot",
        data_dir,
        cache,
        url=address,
        **{f"md5.{part}": value for part, value in sums.items()},
    )


def test_download_is_checked_and_needed_only_once(server, six_characters, tmp_path):
    address, folder = server
    content = omniglot_archives(six_characters)
    for part, data in content.items():
        (folder / f"{part}.zip").write_bytes(data)
    first = open_served_omniglot(address, content, tmp_path / "d", tmp_path / "c")
    assert first.num_classes("train") == 8
    again = open_served_omniglot("http://127.0.0.1:9", content, tmp_path / "d", tmp_path / "c")
    assert again.content_hash == first.content_hash


def test_download_with_wrong_checksum_is_refused(server, six_characters, tmp_path):
    address, folder = server
    content = omniglot_archives(six_characters)
    for part, data in content.items():
        (folder / f"{part}.zip").write_bytes(data[:-50])
    with pytest.raises(UserError) as caught:
        open_served_omniglot(address, content, tmp_path / "d", tmp_path / "c")
    assert all(
        word in str(caught.value) for word in [address, str(tmp_path / "d/omniglot"), "glyphs"]
    )
    assert not list((tmp_path / "d").rglob("*.*")), (
        "the corrupt file was not removed, so the next run would use it"
    )


def test_missing_file_on_the_server_is_reported(server, six_characters, tmp_path):
    address, _ = server
    with pytest.raises(UserError, match="404"):
        open_served_omniglot(
            address, omniglot_archives(six_characters), tmp_path / "d", tmp_path / "c"
        )


@pytest.mark.parametrize(
    ("change", "parts"),
    [({"A/2": 19}, ["19 images", "A/2"]), ({"B/3": 0}, ["5 of Omniglot's 6", "B/3"])],
)
def test_archives_with_wrong_content_are_refused(change, parts, six_characters, tmp_path):
    (tmp_path / "d/omniglot").mkdir(parents=True)
    for part, data in omniglot_archives(six_characters | change).items():
        (tmp_path / f"d/omniglot/{part}.zip").write_bytes(data)
    with pytest.raises(UserError) as caught:
        open_dataset("omniglot", tmp_path / "d", tmp_path / "c")
    assert all(part in str(caught.value) for part in [*parts, "images_background.zip"])


def test_extracted_folders_are_read(six_characters, tmp_path):
    for data in omniglot_archives(six_characters).values():
        zipfile.ZipFile(io.BytesIO(data)).extractall(tmp_path / "d/omniglot")
    assert open_dataset("omniglot", tmp_path / "d", tmp_path / "c").num_classes("test") == 2


def test_sinusoids_follow_their_formula(tmp_path):
    source = open_dataset("sinusoid", tmp_path, tmp_path).episodes("train", Shape(1, 10, 5), 0)
    task = source.draw(0, 200)
    x, y = task.query.x[..., 0].double(), task.query.y[..., 0].double()
    assert x.min() >= -5 and x.max() <= 5

    # Least squares on sin x and cos x recovers each task's sinusoid exactly from its support set.
    def basis(x):
        return torch.stack([x.sin(), x.cos()], -1)

    fitted = torch.linalg.lstsq(
        basis(task.support.x[..., 0].double()), task.support.y.double()
    ).solution
    torch.testing.assert_close((basis(x) @ fitted)[..., 0], y, atol=1e-4, rtol=1e-4)
    amplitude = fitted.square().sum((1, 2)).sqrt()
    assert amplitude.min() >= 0.1 and amplitude.max() <= 5.01
    assert amplitude.std() > 1


def test_too_large_images_are_refused(image_data, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UserError, match="is not a readable image"):
        open_dataset("folder", image_data, tmp_path / "cache", path="pictures")


def test_partly_extracted_cifar100_is_downloaded_again(tmp_path, monkeypatch):
    (tmp_path / "cifar100/cifar-100-python").mkdir(parents=True)
    (tmp_path / "cifar100/cifar-100-python/train").write_bytes(b"")
    urls = []
    monkeypatch.setattr("metalearn.data.folder.fetch", lambda url, *rest: urls.append(url))
    with pytest.raises(UserError):  # the stub downloads nothing
        open_dataset("cifar_fs", tmp_path, tmp_path / "cache")
    assert len(urls) == 1


@pytest.mark.parametrize(
    "response",
    [b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"],
)
def test_servers_that_speak_no_http_or_stop_early_are_reported(response, tmp_path):
    class Odd(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(10000)
            self.request.sendall(response)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Odd) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match="by hand"):
            download.fetch(
                f"http://127.0.0.1:{server.server_address[1]}/x.zip", tmp_path / "data", None
            )
        server.shutdown()
    assert not list(tmp_path.glob("data/*"))
