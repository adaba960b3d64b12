"""Published image sets in their official layouts, made tiny, and what may be wrong with them."""

import hashlib
import io
import itertools
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metalearn import testing
from metalearn.config import choices, components
from metalearn.data import class_splits, pickles
from metalearn.system.errors import UserError
from metalearn.tasks.sampling import Shape
from tests.test_data import _SHARED, open_dataset

_SPLITS = ("train", "val", "test")


def published(name: str) -> dict[str, list[str]]:
    path = class_splits.published_split(name)
    assert path is not None
    return class_splits.split_file(path)


def pixels(count: int, size: int = 84, level: int = 0) -> np.ndarray:
    """Return images whose first pixel is the number of the image."""
    images = np.full((count, size, size, 3), level, np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    return images


def encoded(image: np.ndarray, kind: str = "png") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    return stream.getvalue()


def tar(path: Path, content: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def dump(path: Path, content: object, protocol: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def cifar100(per_class: int = 2) -> dict[str, bytes]:
    """Return the files of cifar-100-python.tar.gz, all classes with a few images."""
    names = sorted(name for some in published("fc100").values() for name in some)
    labels = list(range(100)) * per_class
    batches = {}
    for seed, name in enumerate(("train", "test")):
        shape = (len(labels), 3072)
        data = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
        data[:, 0] = labels
        batches[name] = {"data": data, "fine_labels": labels}
    files = {**batches, "meta": {"fine_label_names": names}}
    return {f"cifar-100-python/{name}": pickle.dumps(one, 2) for name, one in files.items()}


@pytest.mark.parametrize(
    "name",
    ["fc100", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cifar_fs", "cifar100"))],
)
def test_cifar100_is_read_from_its_archive_and_its_folder(name, tmp_path):
    path = tar(tmp_path / "cifar100/cifar-100-python.tar.gz", cifar100())
    data = open_dataset(name, tmp_path, tmp_path / "c")
    sizes = {"fc100": [60, 20, 20], "cifar_fs": [64, 16, 20], "cifar100": [60, 20, 20]}[name]
    assert [data.num_classes(split) for split in _SPLITS] == sizes
    index = data.views["test"].index
    number = sorted(itertools.chain(*published("fc100").values())).index(index.names[0])
    assert data.stores["test"].images[index.rows[0, :4], 0, 0, 0].tolist() == [number] * 4
    with tarfile.open(path) as archive:
        archive.extractall(path.parent)
    assert open_dataset(name, tmp_path, tmp_path / "c").content_hash == data.content_hash
    assert not list((tmp_path / "c").glob(".*")), "a temporary archive remains"
    settings = choices.stored_values("dataset", name)
    testing.check_dataset(components.make(settings, "dataset"), tmp_path, tmp_path / "c")


def cifar10(path: Path) -> Path:
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "x"]
    batch = {"data": np.zeros((20, 3072), np.uint8), "labels": list(range(10)) * 2}
    parts = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    content = {f"cifar-10-batches-py/{part}": pickle.dumps(batch, 2) for part in parts}
    content["cifar-10-batches-py/batches.meta"] = pickle.dumps({"label_names": names}, 2)
    return tar(path, content)


def test_cifar10_is_read_from_its_archive(tmp_path):
    cifar10(tmp_path / "cifar10/cifar-10-python.tar.gz")
    data = open_dataset("cifar10", tmp_path, tmp_path / "c")
    assert [data.num_classes(split) for split in _SPLITS] == [6, 2, 2]
    assert data.views["val"].index.counts.tolist() == [12, 12]


@pytest.mark.slow
def test_cifar10_is_downloaded_and_verified(server, tmp_path):
    address, folder = server
    archive = cifar10(folder / "cifar-10-python.tar.gz")
    changes = {"url": f"{address}/{archive.name}", "md5": "0" * 32}
    with pytest.raises(UserError, match=r"download of .* failed"):
        open_dataset("cifar10", tmp_path, tmp_path / "c", **changes)
    assert not list(tmp_path.glob("cifar10/*"))
    changes["md5"] = hashlib.md5(archive.read_bytes()).hexdigest()
    data = open_dataset("cifar10", tmp_path, tmp_path / "c", **changes)
    assert [data.num_classes(split) for split in _SPLITS] == [6, 2, 2]


def mini_cache(root: Path, protocol: int = 2) -> None:
    for split, names in published("miniimagenet").items():
        rows = {name: [2 * number, 2 * number + 1] for number, name in enumerate(names)}
        content = {"image_data": pixels(2 * len(names), 12), "class_dict": rows}
        dump(root / f"mini-imagenet-cache-{split}.pkl", content, protocol)


@pytest.mark.parametrize("protocol", [2, 5])
def test_miniimagenet_of_pickled_arrays(protocol, tmp_path):
    mini_cache(tmp_path / "miniimagenet", protocol)
    data = open_dataset("miniimagenet", tmp_path, tmp_path / "c", image_size=8)
    assert {split: list(data.class_names(split)) for split in _SPLITS} == published("miniimagenet")
    assert data.inputs.shape == (3, 8, 8)


def test_miniimagenet_of_category_splits_with_numbers(tmp_path):
    root = tmp_path / "miniimagenet"
    for part, first, count in (
        ("train_phase_train", 0, 64), ("train_phase_val", 0, 64), ("val", 64, 16), ("test", 80, 20),
    ):  # fmt: skip
        labels = [first + number for number in range(count) for _ in range(2)]
        content = {"data": pixels(2 * count, 8), "labels": labels}
        dump(root / f"miniImageNet_category_split_{part}.pickle", content)
    data = open_dataset("miniimagenet", tmp_path, tmp_path / "c", image_size=8)
    assert [data.num_classes(split) for split in _SPLITS] == [64, 16, 20]
    assert data.class_names("val")[:2] == ("val/64", "val/65")
    assert len(data.stores["train"]) == 2 * 100  # without the other images of training classes


def write_lists(root: Path, header: str = "filename,label") -> dict[str, list[str]]:
    """Write images/ with two images of each of six classes, and three lists."""
    (root / "images").mkdir(parents=True)
    splits = {"train": ["n01", "n02"], "val": ["n03", "n04"], "test": ["n05", "n06"]}
    for split, names in splits.items():
        files = [(f"{name}{number}.jpg", name) for name in names for number in range(2)]
        for file, _ in files:
            (root / "images" / file).write_bytes(encoded(pixels(1, 8)[0], "jpeg"))
        lines = [header, *(",".join(row) for row in files)]
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return splits


def test_images_in_one_folder_with_lists(tmp_path, caplog):
    splits = write_lists(tmp_path / "miniimagenet")
    changes = {"split": "files", "image_size": 8}
    data = open_dataset("miniimagenet", tmp_path, tmp_path / "c", **changes)
    assert {split: list(data.class_names(split)) for split in _SPLITS} == splits
    assert data.views["test"].index.counts.tolist() == [2, 2]
    again = open_dataset("miniimagenet", tmp_path, tmp_path / "c", image_size=8)
    assert again.protocol("test") == data.protocol("test")
    assert "none of the class names of dataset.split=miniimagenet" in caplog.text
    path = tmp_path / "miniimagenet/train.csv"
    path.write_text(path.read_text().replace(",n01", ",n01532829"))  # one of the published names
    with pytest.raises(UserError, match="miniimagenet names class 'n01558993', which"):
        open_dataset("miniimagenet", tmp_path, tmp_path / "c", image_size=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("val.csv", "n03,x\n"), r"val\.csv: the first row should be filename,label, not n03,x"),
        (("val.csv", ""), r"val\.csv: the first row should be filename,label, not $"),
        (("val.csv", "filename,label\nn010.jpg,n01\n"), "has class 'n01' in both train and val"),
        (("val.csv", "filename,label\nno.jpg,n03\n"), r"lists no\.jpg and 0 other images"),
        (("images/n010.jpg", "\xff"), r"n010\.jpg is not a readable image"),
    ],
)
def test_wrong_lists_are_named(change, message, tmp_path):
    root = tmp_path / "miniimagenet"
    write_lists(root)
    (root / change[0]).write_text(change[1])
    with pytest.raises(UserError, match=message) as caught:
        open_dataset("miniimagenet", tmp_path, tmp_path / "c", split="files", image_size=8)
    assert "\n" not in str(caught.value) and str(root) in str(caught.value)


@pytest.mark.parametrize("form", ["png", "npz"])
def test_tieredimagenet_of_labels_and_images(form, tmp_path):
    root = tmp_path / "tieredimagenet"
    for split in _SPLITS:
        texts = [f"{split} finch", f"{split} crane"]
        labels = {
            "label_specific": np.array([0, 0, 1, 1], np.int32),
            "label_general": np.array([0, 0, 0, 0], np.int32),
            "label_specific_str": texts, "label_general_str": ["bird"],
        }  # fmt: skip
        dump(root / f"{split}_labels.pkl", labels)
        if form == "npz":
            np.savez(root / f"{split}_images.npz", images=pixels(4))
        # OpenCV gives an encoded file as uint8 [B, 1] or [B].
        files = [np.frombuffer(encoded(one), np.uint8)[:, None] for one in pixels(4)]
        dump(root / f"{split}_images_png.pkl", files)
    data = open_dataset("tieredimagenet", tmp_path, tmp_path / "c")
    assert data.class_names("val") == ("val finch", "val crane")
    crane = data.stores["val"].images[data.views["val"].index.rows[1], 0, 0, 0]
    assert crane.tolist() == [2, 3]


def test_tieredimagenet_of_class_folders(tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for split, names in published("tieredimagenet").items():
            for name in names:
                for number in range(2):
                    archive.writestr(f"{split}/{name}/{number}.png", encoded(pixels(1, 8)[0]))
    changes = {"path": "all.zip", "image_size": 8}
    data = open_dataset("tieredimagenet", tmp_path, tmp_path / "c", **changes)
    assert [data.num_classes(split) for split in _SPLITS] == [351, 97, 160]


def test_cub_and_caltech101_are_read_from_their_archives(tmp_path):
    birds = [name for some in published("cub").values() for name in some]
    content = {
        f"CUB_200_2011/images/{name}/{number}.jpg": encoded(pixels(1, 8)[0], "jpeg")
        for name in birds for number in range(2)
    }  # fmt: skip
    tar(tmp_path / "cub/CUB_200_2011.tgz", {"attributes.txt": b"1", **content})
    data = open_dataset("cub", tmp_path, tmp_path / "c", image_size=8)
    assert [data.num_classes(split) for split in _SPLITS] == [100, 50, 50]
    assert data.class_names("val")[0] == "002.Laysan_Albatross"
    names = ["BACKGROUND_Google", "Faces_easy", *(f"kind{number}" for number in range(10))]
    content = {
        f"101_ObjectCategories/{name}/image_{number:04}.jpg": encoded(pixels(1, 8)[0], "jpeg")
        for name in names for number in range(2)
    }  # fmt: skip
    inner = tar(tmp_path / "101_ObjectCategories.tar.gz", content)
    (tmp_path / "caltech101").mkdir()
    with zipfile.ZipFile(tmp_path / "caltech101/caltech-101.zip", "w") as archive:
        archive.writestr("caltech-101/101_ObjectCategories.tar.gz", inner.read_bytes())
        archive.writestr("__MACOSX/caltech-101/._101_ObjectCategories.tar.gz", b"no tar")
    data = open_dataset("caltech101", tmp_path, tmp_path / "c", image_size=8)
    assert [data.num_classes(split) for split in _SPLITS] == [6, 2, 2]
    assert all("kind" in name for split in _SPLITS for name in data.class_names(split))


def test_a_tar_next_to_images_in_a_zip_is_ignored(tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in "abcde":
            archive.writestr(f"{name}/1.png", encoded(pixels(1, 8)[0]))
        archive.writestr("notes.tar", b"no tar")
    data = open_dataset("folder", tmp_path, tmp_path / "c", path="all.zip", image_size=8)
    assert sum(data.num_classes(split) for split in _SPLITS) == 5


def test_links_and_paths_in_a_tar_lead_nowhere(tmp_path):
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for name in ("a/1.png", "b/1.png", "c/1.png", "d/1.png", "../../e/1.png"):
            info = tarfile.TarInfo(name)
            info.size = len(image := encoded(pixels(1, 8)[0]))
            archive.addfile(info, io.BytesIO(image))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("a/link.png")
            link.type, link.linkname = kind, "/etc/passwd"
            archive.addfile(link)
    before = sorted(tmp_path.rglob("*.png"))
    data = open_dataset("folder", tmp_path, tmp_path / "c", path="all.tar", image_size=8)
    assert sum(data.views[split].index.num_inputs for split in _SPLITS) == 4
    assert sorted(tmp_path.rglob("*.png")) == before == []


def test_truncated_archives_are_refused_in_one_line(tmp_path):
    path = tar(tmp_path / "cub/CUB_200_2011.tgz", {"a/b/1.jpg": os.urandom(9000)})
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"CUB_200_2011\.tgz cannot be read .* truncated"):
        open_dataset("cub", tmp_path, tmp_path / "c")
    mini_cache(tmp_path / "miniimagenet")
    path = tmp_path / "miniimagenet/mini-imagenet-cache-val.pkl"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"cache-val\.pkl is not a file of images \(.*truncated"):
        open_dataset("miniimagenet", tmp_path, tmp_path / "c")
    np.savez(path.with_suffix(".npz"), images=pixels(2))
    path.unlink()
    with pytest.raises(UserError, match=r"cache-val\.npz .*it has no labels or label_specific"):
        open_dataset("miniimagenet", tmp_path, tmp_path / "c")
    path.with_suffix(".npz").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"cache-val\.npz is not a file of images"):
        open_dataset("miniimagenet", tmp_path, tmp_path / "c")


def test_missing_sets_say_where_to_get_them(tmp_path):
    for name in ("miniimagenet", "tieredimagenet"):
        with pytest.raises(
            UserError, match=r"may not be redistributed: https://image-net\.org"
        ) as e:
            open_dataset(name, tmp_path, tmp_path / "c")
        assert str(tmp_path / name) in str(e.value)
    with pytest.raises(UserError, match=r"cannot be reached .* by hand"):
        open_dataset("cub", tmp_path, tmp_path / "c", url="http://127.0.0.1:9/CUB_200_2011.tgz")


def test_a_class_in_two_splits_is_refused(tmp_path):
    mini_cache(tmp_path / "miniimagenet")
    content = {"image_data": pixels(2, 8), "class_dict": {"n01532829": [0, 1]}}
    dump(tmp_path / "miniimagenet/mini-imagenet-cache-test.pkl", content)
    with pytest.raises(UserError, match="has class 'n01532829' in both train and test"):
        open_dataset("miniimagenet", tmp_path, tmp_path / "c", image_size=8)


def test_a_class_with_one_example_is_named(tmp_path):
    for number, count in enumerate([3, 3, 3, 3, 3, 1]):
        folder = tmp_path / f"pictures/{number}"
        folder.mkdir(parents=True)
        for image in range(count):
            (folder / f"{image}.png").write_bytes(encoded(pixels(1, 8)[0]))
    split = {"train": ["0", "1"], "val": ["2", "3"], "test": ["4", "5"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    changes = {"split": tmp_path / "split.json", "image_size": 8}
    data = open_dataset("folder", tmp_path, tmp_path / "c", **changes)
    with pytest.raises(UserError, match="class '5' has only 1 example; add examples to it, or"):
        data.episodes("test", Shape(2, 1, 1), 0)
    changes |= {"split": "random", "exclude": "['5']", "fractions": "[0.6,0.2,0.2]"}
    data = open_dataset("folder", tmp_path, tmp_path / "c", **changes)
    assert "5" not in [name for some in _SPLITS for name in data.class_names(some)]


class _Calls:
    """A pickle of it calls a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickles_of_code_run_nothing(protocol, tmp_path):
    marker = tmp_path / "marker"
    for content in (_Calls(eval, "1"), np.zeros(1).astype, Path, _Calls(os.mkdir, str(marker))):
        data = pickle.dumps({"data": content}, protocol)
        with pytest.raises(pickle.UnpicklingError, match=r"it names .*, which is not data"):
            pickles.load(io.BytesIO(data))
    for split in _SPLITS:
        dump(tmp_path / f"miniimagenet/mini-imagenet-cache-{split}.pkl", content, protocol)
    with pytest.raises(
        UserError, match=r"cache-train\.pkl is not a file of images \(it names \w+\.mk"
    ):
        open_dataset("miniimagenet", tmp_path, tmp_path / "c")
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickles_of_data_are_read(protocol):
    arrays = [np.arange(6, dtype=kind).reshape(2, 3) for kind in ("u1", "<i8", ">i4", "f4", "f8")]
    arrays += [
        np.asfortranarray(arrays[0]),
        np.array(["a", "bc"]),
        np.array([b"a"]),
        np.array(["x", None], object),
        np.zeros((0, 2)),
        np.array(True),
    ]
    content = {
        "arrays": arrays,
        "bytes": b"\xff\x00",
        "set": {1},
        "number": np.float32(2.5),
        "more": (None, [1.5, "é"], bytearray(b"1"), bytearray()),
    }
    back = pickles.load(io.BytesIO(pickle.dumps(content, protocol)))
    for one, other in zip(arrays, back.pop("arrays"), strict=True):
        assert one.dtype.newbyteorder("=") == other.dtype.newbyteorder("=")
        np.testing.assert_array_equal(one, other)
    del content["arrays"]
    assert back == content


def test_pickled_arrays_of_python_2_are_read():
    """As Python 2 writes np.array([[0, 1, 2], [253, 254, 255]], np.uint8), in CIFAR's files."""
    content = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        b"K\x02K\x03\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff"
        b"\xff\xff\xffK\x00tb\x89U\x06\x00\x01\x02\xfd\xfe\xfftb."
    )
    assert pickles.load(io.BytesIO(content)).tolist() == [[0, 1, 2], [253, 254, 255]]


def test_pickled_arrays_with_fields_are_refused():
    """A forged dtype with fields could make NumPy follow pointers that the file contains."""
    with pytest.raises(pickle.UnpicklingError, match="an array of V8"):
        pickles.load(io.BytesIO(pickle.dumps(np.zeros(2, [("a", "f8")]))))


def test_pickled_numbers_allocate_nothing():
    with pytest.raises(TypeError, match="not subscriptable"):
        pickles.load(io.BytesIO(b"cbuiltins\nbytearray\n(I100000000000\ntR."))


def test_published_splits_have_the_published_sizes():
    sizes = {
        "cifar_fs": (64, 16, 20),
        "fc100": (60, 20, 20),
        "miniimagenet": (64, 16, 20),
        "tieredimagenet": (351, 97, 160),
        "cub": (100, 50, 50),
    }
    for name, expected in sizes.items():
        assert tuple(map(len, published(name).values())) == expected
    shared = set(published("cifar_fs")["train"]) & set(published("fc100")["test"])
    assert len(shared) == 11


@pytest.mark.slow
@pytest.mark.skipif(
    not (_SHARED / "images").exists(), reason="real images are not in METALEARN_DATA"
)
def test_real_image_sets(tmp_path):
    data = open_dataset("fc100", _SHARED, tmp_path)
    assert [data.num_classes(split) for split in _SPLITS] == [60, 20, 20]
    data = open_dataset("caltech101", _SHARED, tmp_path, path="images/caltech101")
    assert sum(data.num_classes(split) for split in _SPLITS) == 99
    for name, count in (("deeppcb", 6), ("bccd", 3)):
        data = open_dataset("folder", _SHARED, tmp_path, path=f"images/{name}")
        assert sum(data.num_classes(split) for split in _SPLITS) == count
        assert torch.equal(data.views["test"].index.counts.unique(), torch.tensor([100]))
