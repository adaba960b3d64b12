"""Users as tasks: reading, splits, episodes, and methods that run unchanged."""

import csv
import json

import numpy as np
import pytest
import torch

import metalearn
from metalearn.cli import train
from metalearn.config import checking, components, composition
from metalearn.system.errors import UserError
from metalearn.tasks.sampling import Shape

_USERS = 40


def write_ratings(path, users=_USERS, seed=0):
    """Write ratings that depend on a user's taste for two features; users have 14 to 30 rows."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        taste = rng.normal(size=2)
        for _ in range(14 + user % 17):
            x = rng.normal(size=2).round(4)
            rating = float(x @ taste)
            rows.append([f"u{user:02}", *x, f"{rating:.4f}", "yes" if rating > 0 else "no"])
    order = rng.permutation(len(rows))
    with path.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["user", "year", "price", "rating", "liked"])
        table.writerows(rows[index] for index in order)
    return path


def opened(file, name="user_values", **settings):
    node = checking.check_config(composition.compose_config([f"dataset={name}"])).dataset
    given = {"path": str(file), "features": ["year", "price"], **settings}
    made = components.make(node | given, "dataset")
    return made.open(file.parent, file.parent, torch.device("cpu"))


def rows_by_user(path):
    with path.open(newline="") as stream:
        table = list(csv.DictReader(stream))
    users: dict[str, dict[tuple[float, float], dict[str, str]]] = {}
    for row in table:
        place = (float(row["year"]), float(row["price"]))
        users.setdefault(row["user"], {}).setdefault(place, row)
    return users


@pytest.mark.parametrize("name", ["user_values", "user_classes"])
def test_a_task_has_rows_of_one_user_and_no_row_twice(name, tmp_path):
    path = write_ratings(tmp_path / "ratings.csv")
    data = opened(path, name, standardise=False)
    shape = Shape(1, 4, 8) if name == "user_values" else Shape(2, 2, 2)
    users = rows_by_user(path)
    seen: dict[str, set[str]] = {}
    owner = {place: user for user, rows in users.items() for place in rows}
    rounded = {(np.float32(a), np.float32(b)): user for (a, b), user in owner.items()}
    for split in ("train", "val", "test"):
        tasks = data.episodes(split, shape, 0).draw(0, 200)
        x = torch.cat([tasks.support.x, tasks.query.x], 1)
        y = torch.cat([tasks.support.y, tasks.query.y], 1)
        seen[split] = set()
        for each_x, each_y in zip(x.numpy(), y.numpy(), strict=True):
            places = [tuple(one) for one in each_x]
            assert len(set(places)) == len(places)
            (user,) = {rounded[place] for place in places}
            seen[split].add(user)
            given = {(np.float32(a), np.float32(b)): row for (a, b), row in users[user].items()}
            for place, target in zip(places, each_y, strict=True):
                row = given[place]
                if name == "user_values":
                    assert target == np.float32(row["rating"])
                else:
                    assert data.classes[target] == row["liked"]
        assert seen[split] <= set(data.users[split])
    together = [user for some in data.users.values() for user in some]
    assert sorted(together) == sorted(users)
    sizes = {user: [row["liked"] for row in rows.values()] for user, rows in users.items()}
    is_enough = {
        user: name == "user_values" or min(map(labels.count, ("no", "yes"))) >= 4
        for user, labels in sizes.items()
    }
    assert seen["test"] == {user for user in data.users["test"] if is_enough[user]}


def test_features_are_standardised_by_training_users_only(tmp_path):
    path = write_ratings(tmp_path / "ratings.csv")
    data = opened(path)
    users = rows_by_user(path)
    own = np.array([place for user in data.users["train"] for place in users[user]])
    np.testing.assert_allclose(data.standardisation["shift"], own.mean(0))
    np.testing.assert_allclose(data.standardisation["scale"], 1 / own.std(0))
    batch = data.batches("train", 4000, 0).draw(0, 1)
    assert abs(float(batch.x.mean())) < 0.05 and abs(float(batch.x.std()) - 1) < 0.05
    raw = opened(path, standardise=False).batches("train", 500, 0).draw(0, 1).x[0]
    assert {tuple(one) for one in raw.numpy()} <= {tuple(np.float32(place)) for place in own}


def test_short_users_are_left_out_and_repeated_rows_too(tmp_path, caplog):
    path = write_ratings(tmp_path / "ratings.csv")
    with path.open("a") as stream:
        stream.write(path.read_text().splitlines()[1] + "\n")
    data = opened(path)
    assert "1 rows repeat the features" in caplog.text
    episodes = data.episodes("train", Shape(1, 10, 10), 0)
    assert "users have fewer than 20 rows" in caplog.text
    assert int(episodes.counts.min()) >= 20 and len(episodes.starts) < len(data.users["train"])


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({"user": "person"}, None, "dataset.user=person: .* has no such column; it has user"),
        ({"features": ["colour"]}, None, "dataset.features=colour"),
        ({"features": []}, None, "of column liked is .*, not a number"),
        ({"fractions": [1.0, 0.0, 0.0]}, None, "leaves no user for val"),
        ({"path": "nowhere.csv"}, None, "there is no file"),
        ({}, Shape(2, 1, 1), "episode.way=2; should be 1"),
        ({}, Shape(1, 30, 30), "no user has so many rows; lower episode.shot"),
        ({}, Shape(1, 1, 1, unlabelled=1), "no unlabelled examples"),
    ],
)
def test_mistakes_are_named(settings, shape, message, tmp_path):
    path = write_ratings(tmp_path / "ratings.csv")
    with pytest.raises(UserError, match=message):
        opened(path, **settings).episodes("train", shape or Shape(1, 1, 1), 0)


def test_a_broken_row_is_named(tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_text("user,year,price,rating\na,1,2,3\nb,1,2\n")
    with pytest.raises(UserError, match="row 3 has 3 cells, not 4"):
        opened(path)


def trained(tmp_path, *words):
    path = write_ratings(tmp_path / "ratings.csv")
    small = ["train.steps=2", "train.meta_batch=2", "val.episodes=4", "test.episodes=4"]
    given = [f"dataset.path={path}", "dataset.features=[year,price]", "logger=none", *small]
    folder = tmp_path / "run"
    assert train.main([*words, *given, f"hydra.run.dir={folder}"]) == 0
    return folder, json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("algo", ["maml", "finetune"])
def test_methods_of_values_run_unchanged(algo, tmp_path):
    shape = ["episode.shot=4", "episode.query=8"]
    folder, result = trained(tmp_path, f"algo={algo}", "dataset=user_values", *shape)
    assert set(result["test"]) == {"mse"} and result["protocol"]["num_users"] == 8
    # The loaded run standardises features as the dataset does.
    data = opened(tmp_path / "ratings.csv")
    shift, scale = (np.array(data.standardisation[name]) for name in ("shift", "scale"))
    task = data.episodes("test", Shape(1, 4, 8), 0).draw(0, 1)
    raw = [torch.tensor(one[0].numpy() / scale + shift) for one in (task.support.x, task.query.x)]
    model = metalearn.load(folder).adapt(raw[0], task.support.y[0])
    torch.testing.assert_close(model.inputs(raw[1]), task.query.x[0], atol=1e-5, rtol=1e-5)
    assert model.predict(raw[1]).shape == (8, 1)


@pytest.mark.parametrize("algo", ["maml", "protonet", "baseline"])
def test_methods_of_classes_run_unchanged(algo, tmp_path):
    shape = ["episode.shot=2", "episode.query=2"]
    _, result = trained(tmp_path, f"algo={algo}", "dataset=user_classes", *shape)
    assert set(result["test"]) == {"accuracy"} and result["protocol"]["classes"] == ["no", "yes"]
