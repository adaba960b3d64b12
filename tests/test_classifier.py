"""FewShotClassifier: heads, cross-validation, intervals, and the contract of scikit-learn."""

import json
import pickle

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import check_estimator

from metalearn import FewShotClassifier
from metalearn.predict import confidence, heads
from metalearn.predict.choice import HeadChoice
from metalearn.predict.confidence import Outputs, hold_out
from metalearn.system.errors import UserError

pytestmark = pytest.mark.slow

#: Checks of scikit-learn that are skipped here, with the reason.
_SKIPPED = {
    "check_array_api_input": "needs a variable of the environment",
    "check_classifier_data_not_an_array": "needs pandas",
}


def gaussian(seed=0, way=4, shot=5, size=8, spread=2.0, queries=200):
    """Return examples and queries of Gaussian classes."""
    rng = np.random.default_rng(seed)
    means = spread * rng.normal(size=(way, size)) + rng.normal(size=size)
    y, truth = np.repeat(np.arange(way), shot), rng.integers(0, way, queries)
    x = means[y] + rng.normal(size=(len(y), size))
    return x, y, means[truth] + rng.normal(size=(queries, size)), truth


@pytest.mark.parametrize(
    "settings",
    [
        *({"head": head, "calibrate": False} for head in heads.HEADS),
        {"head": "prototype"},
        pytest.param({}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_contract_of_scikit_learn(settings, monkeypatch):
    if not settings:  # the automatic choice, between two heads; each head alone is a case above
        monkeypatch.setattr(heads, "HEADS", ("ridge", "prototype"))
    results = check_estimator(FewShotClassifier(**settings), on_fail=None, on_skip=None)
    failed = {one["check_name"]: one["exception"] for one in results if one["status"] == "failed"}
    assert not failed
    skipped = {one["check_name"] for one in results if one["status"] == "skipped"}
    assert skipped <= set(_SKIPPED)


@pytest.mark.parametrize("way", [2, 5])
def test_logistic_equals_a_script_with_scikit_learn(way):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(30, 12))

    def network(images):
        return np.tanh(np.stack(images) @ weight)

    images = list(rng.normal(size=(way * 4, 30)))
    y = np.repeat([f"class {number}" for number in range(way)], 4)
    queries = list(rng.normal(size=(20, 30)))

    def features(images):
        z = network(images).astype(np.float32).astype(np.float64)
        return z / np.linalg.norm(z, axis=1, keepdims=True)

    script = LogisticRegression(tol=1e-8, max_iter=10_000).fit(features(images), y)
    classifier = FewShotClassifier(network, "logistic", calibrate=False).fit(images, y)
    assert classifier.classes_.tolist() == script.classes_.tolist()
    expected = script.predict_proba(features(queries))
    np.testing.assert_allclose(classifier.predict_proba(queries), expected, atol=1e-5)


def test_heads_equal_their_formulas():
    x, y, queries, _ = gaussian(way=3)
    z, q = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, queries))
    means = np.stack([z[y == one].mean(0) for one in range(3)])
    distance = ((q[:, None] - means) ** 2).sum(-1)
    each = ((q[:, None] - z) ** 2).sum(-1)
    bar = z.mean(0)
    target = np.eye(3)[y]
    ridge = np.linalg.solve((z - bar).T @ (z - bar) + np.eye(z.shape[1]), (z - bar).T @ target)
    expected = {
        "prototype": -distance / 0.2,
        "cosine": q @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T / 0.1,
        "nearest": -np.stack([each[:, y == one].min(1) for one in range(3)], 1) / 0.2,
        "ridge": ((q - bar) @ ridge + target.mean(0)) / 0.1,
    }
    for head, logits in expected.items():
        learned = heads.learn(head, "l2", x, y, 3)
        np.testing.assert_allclose(heads.logits(head, learned, queries), logits, atol=1e-8)
    np.testing.assert_allclose(heads.novelty(learned, queries), distance.min(1), atol=1e-8)


@pytest.mark.parametrize("head", ["logistic", "ridge"])
def test_a_class_with_more_examples_has_no_more_weight(head):
    x, y, queries, _ = gaussian(way=2)
    more = np.concatenate([x, x[y == 1], x[y == 1]]), np.concatenate([y, [1] * 10])
    equal, unequal = (
        heads.logits(head, heads.learn(head, "l2", *data), queries).argmax(1).mean()
        for data in ((x, y, 2, 1e4), (*more, 2, 1e4))
    )
    assert abs(float(equal) - float(unequal)) < 0.02


def test_more_examples_and_removed_classes_equal_a_new_fit(tmp_path):
    x, y, queries, _ = gaussian()
    whole = FewShotClassifier(head="ridge").fit(x, y)
    parts = FewShotClassifier(head="ridge")
    for one in (y < 2, y == 2, y == 3):
        parts.partial_fit(x[one], y[one])
    np.testing.assert_array_equal(parts.predict_proba(queries), whole.predict_proba(queries))
    assert parts.confidence_ == whole.confidence_
    rest = FewShotClassifier(head="ridge").fit(x[y != 1], y[y != 1])
    parts.forget([1])
    np.testing.assert_array_equal(parts.predict_proba(queries), rest.predict_proba(queries))
    with pytest.raises(ValueError, match="no class 7"):
        parts.forget([7])


@pytest.mark.parametrize("head", [*heads.HEADS, "auto"])
def test_saved_classifier_predicts_the_same(head, tmp_path):
    x, y, queries, _ = gaussian()
    classifier = FewShotClassifier(head=head).fit(x, np.array(list("abcd"))[y])
    classifier.save(tmp_path)
    classifier.save(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".npz"]
    for copy in (FewShotClassifier.load(tmp_path), pickle.loads(pickle.dumps(classifier))):
        assert copy.label(queries) == classifier.label(queries)
        assert copy.partial_fit(x, y.astype(str)).classes_.tolist() == [*"0123", *"abcd"]


def test_load_runs_no_code_and_names_the_fault(tmp_path):
    x, y, _, _ = gaussian()
    FewShotClassifier(head="prototype").fit(x, y).save(tmp_path)
    (arrays,) = tmp_path.glob("*.npz")
    intact, document = arrays.read_bytes(), (tmp_path / "classifier.json").read_text()

    class Hostile:
        def __reduce__(self):
            return (tmp_path.joinpath("executed").touch, ())

    np.savez(arrays, examples=np.array([Hostile()], dtype=object), targets=np.zeros(1))
    with pytest.raises(UserError, match="is not a classifier"):
        FewShotClassifier.load(tmp_path)
    assert not (tmp_path / "executed").exists()
    arrays.write_bytes(intact)
    content = json.loads(document)
    changes: list[dict] = [
        {"format": 99}, {"settings": {"plugin": "os"}}, {"settings": {"backbone": {}}},
        {"notes": []}, {"classes": [1, 2]}, {"head": "ridge"}, {"confidence": {"x": 1}},
    ]  # fmt: skip
    for change in changes:
        (tmp_path / "classifier.json").write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=f"{tmp_path} is|backbone="):
            FewShotClassifier.load(tmp_path)
    (tmp_path / "classifier.json").write_text(document)
    arrays.write_bytes(intact[: len(intact) // 2])
    with pytest.raises(UserError, match="is not a classifier"):
        FewShotClassifier.load(tmp_path)
    (tmp_path / "classifier.json").write_text("[")
    with pytest.raises(UserError, match="is not a classifier"):
        FewShotClassifier.load(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        FewShotClassifier.load(tmp_path / "nowhere")


def test_a_python_function_cannot_be_saved(tmp_path):
    x, y, _, _ = gaussian()
    classifier = FewShotClassifier(np.stack, "prototype").fit(list(x), y)
    with pytest.raises(UserError, match="cannot be saved"):
        classifier.save(tmp_path)


def test_held_out_examples_are_not_trained_on():
    counts = [1, 2, 5, 12]
    y = np.repeat(np.arange(4), counts)
    x = np.arange(len(y), dtype=float)[:, None]
    fractions = []

    def procedure(train_x, train_y, way, queries):
        assert not set(train_x[:, 0]) & set(queries[:, 0])
        assert set(train_y) == set(range(4))
        assert len(train_x) + len(queries) == len(x)
        fractions.append(len(queries) / len(x))
        return Outputs(np.zeros((len(queries), way)), queries[:, 0])

    held_out = hold_out(procedure, x, y, 4)
    assert held_out is not None and held_out.repeats == 2 and held_out.examples == 19
    np.testing.assert_array_equal(np.bincount(held_out.rows), [0] + [2] * 19)
    np.testing.assert_array_equal(held_out.novelty, held_out.rows)
    np.testing.assert_array_equal(held_out.y, y[held_out.rows])
    assert max(fractions) < 0.25
    assert hold_out(procedure, x[:2], np.array([0, 1]), 2) is None


def test_choice_of_the_head_is_nested(monkeypatch):
    x, y, _, _ = gaussian(spread=0.5)
    seen = []

    def choose(self, x, y, way, fits):
        seen.append(len(x))
        return ("prototype", 1.0) if len(x) == 20 else ("nearest", 1.0)

    monkeypatch.setattr(HeadChoice, "choose", choose)
    classifier = FewShotClassifier(normalise="standard").fit(x, y)
    assert sorted(seen) == [16] * 10 + [20]
    assert classifier.head_ == "prototype"

    # Each held-out example was predicted by the head that was chosen without it.
    def nearest(x, y, way, queries):
        return HeadChoice("auto", "standard", 1.0, 0).outputs("nearest", x, y, way, queries)

    expected = confidence.assess(hold_out(nearest, x, y, 4, fits=10), 4, 0.1)
    assert classifier.confidence_ == expected


def test_auto_chooses_the_best_head():
    # Two clusters for each class, at the corners of a square: only "nearest" separates them.
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 8)
    corners = np.array([[[3, 3], [-3, -3]], [[3, -3], [-3, 3]]])
    x = corners[y, np.arange(16) % 2] + 0.3 * rng.normal(size=(16, 2))
    classifier = FewShotClassifier().fit(x, y)
    assert classifier.head_ == "nearest" and classifier.confidence_.accuracy > 0.9


@pytest.mark.parametrize("shot", [2, 5])
def test_interval_covers_the_accuracy(shot):
    covered, widths = [], []
    for seed in range(100):
        spread = np.random.default_rng(seed).uniform(0.3, 1.5)
        x, y, queries, truth = gaussian(seed, 6, shot, 16, spread, 100)
        classifier = FewShotClassifier(head="prototype", normalise="l2").fit(x, y)
        interval = classifier.confidence_.interval(100)
        assert interval is not None
        low, high = interval
        covered.append(low <= (classifier.predict(queries) == truth).mean() <= high)
        widths.append(high - low)
    assert np.mean(covered) > 0.93
    assert np.median(widths) < (0.6 if shot == 2 else 0.35)


def test_interval_touches_its_bounds_only_without_an_exception():
    low, high = confidence.accuracy_interval(1.0, 25, 5)
    assert 0.85 < low < 0.95 and high == 1
    low, high = confidence.accuracy_interval(0.0, 25, 5)
    assert low == 0 and 0.05 < high < 0.4
    wide, narrow = (confidence.accuracy_interval(0.8, 100, 5, n) for n in (20, None))
    assert wide[0] < narrow[0] < 0.8 < narrow[1] < wide[1]


@pytest.mark.parametrize(("examples", "rate"), [(19, 0.05), (40, 0.1), (25, 0.2)])
def test_conformal_threshold_is_exceeded_at_its_rate(examples, rate):
    rng = np.random.default_rng(0)
    missed = []
    for _ in range(4000):
        threshold = confidence.conformal_threshold(rng.normal(size=examples), examples, rate)
        assert threshold is not None
        missed.append(rng.normal() > threshold)
    rank = np.ceil((1 - rate) * (examples + 1))
    assert abs(np.mean(missed) - (1 - rank / (examples + 1))) < 0.015
    assert confidence.conformal_threshold(np.arange(8.0), 8, 0.1) is None
    assert confidence.conformal_threshold(np.arange(9.0), 9, 0.1) == 8
    # In two folds, the final classifier has twice as many examples: rank 0.85 * 21 of 20.
    assert confidence.conformal_threshold(np.arange(20.0), 20, 0.1, folds=2) == 17
    assert confidence.conformal_threshold(np.arange(8.0), 8, 0.1, folds=2) is None


def test_temperature_is_recovered():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 4)) * 2
    y = (softmax(logits, 1).cumsum(1) > rng.random((20_000, 1))).argmax(1)
    assert confidence.temperature(3 * logits, y, 20_000) == pytest.approx(3, rel=0.05)
    assert 0 < confidence.temperature(np.eye(3) * 9, np.arange(3), 3) < np.inf


def test_a_wrong_label_is_found_and_no_right_one():
    x, y, _, _ = gaussian(spread=3)
    assert FewShotClassifier(head="prototype").fit(x, y).confidence_.doubtful == []
    wrong = y.copy()
    wrong[7] = 3
    ((row, likely, probability),) = (
        FewShotClassifier(head="prototype").fit(x, wrong).confidence_.doubtful
    )
    assert (row, likely) == (7, y[7]) and probability > 0.5


def test_images_of_no_class_are_unknown_at_the_error_rate():
    own, other = [], []
    for seed in range(40):
        x, y, queries, _ = gaussian(seed, way=5, shot=8, size=16, spread=2)
        classifier = FewShotClassifier(head="prototype", normalise="l2", error_rate=0.2).fit(x, y)
        own.append(np.mean([one.unknown for one in classifier.label(queries)]))
        strangers = gaussian(seed + 1000, way=2, size=16, spread=2)[2]
        other.append(np.mean([one.unknown for one in classifier.label(strangers)]))
    assert 0.1 < np.mean(own) < 0.22
    assert np.mean(other) > 0.8


def test_one_example_of_each_class_says_what_cannot_be_known():
    x, y, queries, _ = gaussian(shot=1)
    classifier = FewShotClassifier().fit(x, y)
    assert classifier.confidence_.interval() is None and classifier.head_ == "ridge"
    label = classifier.label(queries)[0]
    assert label.unknown is None and label.plausible is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"head": "x"}, "head=x"), ({"normalise": "x"}, "normalise=x"), ({"error_rate": 1}, "rate=1")],
)
def test_wrong_settings_are_named(settings, message):
    x, y, _, _ = gaussian()
    with pytest.raises(ValueError, match=message):
        FewShotClassifier(**settings).fit(x, y)
