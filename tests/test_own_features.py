"""Feature vectors of a user's own file."""

import numpy as np
import pytest

from metalearn.system.errors import UserError
from metalearn.tasks.sampling import Shape
from tests.test_data import open_dataset

_X = np.random.default_rng(0).normal(size=(24, 3))
_LABELS = [f"kind {number % 6}" for number in range(24)]


def write_csv(path, rows=None, header="a,label,b,c"):
    lines = rows or [f"{x[0]},{label},{x[1]},{x[2]}" for x, label in zip(_X, _LABELS, strict=True)]
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def test_csv_and_npz_give_the_same_data(tmp_path):
    changes = {"path": write_csv(tmp_path / "a.csv"), "fractions": "[0.34,0.33,0.33]"}
    data = open_dataset("features", tmp_path, tmp_path, **changes)
    assert data.inputs.shape == (3,) and data.inputs.kind == "features"
    task = data.episodes("test", Shape(2, 3, 1), 0).draw(0, 1)
    names = data.class_names("test")
    classes = data.episodes("test", Shape(2, 3, 1), 0).classes(0, 1)[0]
    for x, y in zip(task.support.x[0], task.support.y[0], strict=True):
        row = int(np.argmin(np.abs(_X - x.numpy()).sum(1)))
        assert _LABELS[row] == names[classes[y]]
    np.savez(tmp_path / "a.npz", features=_X, labels=_LABELS)
    again = open_dataset("features", tmp_path, tmp_path, **changes | {"path": "a.npz"})
    assert again.content_hash == data.content_hash


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_tables_of_other_programs_are_read(encoding, tmp_path):
    plain = write_csv(tmp_path / "a.csv", header="größe,label,b,c")
    other = tmp_path / "b.csv"
    other.write_bytes(
        plain.read_text().replace("label", "Label").replace(",", ";").encode(encoding)
    )
    first, second = (open_dataset("features", tmp_path, tmp_path, path=p) for p in (plain, other))
    assert first.content_hash == second.content_hash


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (None, "0.1,kind 0,0.2,0.3", "the first row should name the columns, one of them label"),
        (["1,a,2,3", "1,,2,3"], "a,label,b,c", "row 3 has no label"),
        (["1,a,2"], "a,label,b,c", "row 2 has no label, or not 4 cells"),
        (["1,a,x,3"], "a,label,b,c", "could not convert string to float: 'x'"),
        (["1,a,nan,3"], "a,label,b,c", "row 1 of the features is not finite"),
    ],
)
def test_wrong_tables_are_refused_in_one_line(rows, header, message, tmp_path):
    path = write_csv(tmp_path / "a.csv", rows, header)
    with pytest.raises(UserError, match=rf"a\.csv cannot be read: .*{message}"):
        open_dataset("features", tmp_path, tmp_path, path=path)


def test_wrong_archives_are_refused_in_one_line(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, features=np.array([{}], object), labels=["a"])
    with pytest.raises(UserError, match=r"a\.npz cannot be read: .*allow_pickle=False"):
        open_dataset("features", tmp_path, tmp_path, path=path)
    np.savez(path, x=_X)
    with pytest.raises(UserError, match="should hold features and labels, not x"):
        open_dataset("features", tmp_path, tmp_path, path=path)
    np.savez(path, features=_X, labels=_LABELS[1:])
    with pytest.raises(UserError, match=r"features are \[24, 3\], labels \[23\]"):
        open_dataset("features", tmp_path, tmp_path, path=path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"a\.npz cannot be read"):
        open_dataset("features", tmp_path, tmp_path, path=path)
    with pytest.raises(UserError, match=r"there is no file .*b\.csv; bring a CSV file"):
        open_dataset("features", tmp_path, tmp_path, path="b.csv")
