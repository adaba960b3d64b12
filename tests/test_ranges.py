"""Episodes of different shapes: ranges of ways and shots, and unbalanced shots."""

import collections
import dataclasses
import math
import random
from typing import Any

import pytest
import torch

from metalearn.algorithms.protonet import ProtoNet
from metalearn.config import checking, composition
from metalearn.report.progress import SILENT
from metalearn.run import loop, measure, scoring
from metalearn.run.build import build
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.ranges import Ranges, parts_of, unbalanced_shots, varied
from metalearn.tasks.sampling import Shape
from tests.test_episodes import class_and_image, numbered_data

_RANGES = ("episode.way=[2,5]", "episode.shot=[1,4]")
_SMALL = (
    "backbone.hidden=[8]", "episode.query=3", "val.episodes=2", "test.episodes=40",
    "logger=none", "device=cpu",
)  # fmt: skip


def make(*words):
    """Build a small run on feature vectors, which 60, 20 and 20 classes have."""
    words = ("algo=protonet", "dataset=gaussians", *_SMALL, *words)
    return build(checking.check_config(composition.compose_config(list(words))))


@pytest.fixture(scope="module")
def data():
    return numbered_data({"train": [20] * 12, "val": [20] * 12, "test": [20] * 12})


def make_source(data, ranges, split="test", seed=1, each=1):
    largest = Shape(ranges.way[1], ranges.shot[1], 3)
    return varied(data.episodes(split, largest, seed), ranges, split, seed, each)


def test_ways_and_shots_are_uniform_in_their_ranges():
    keys = prng.fold_in(prng.key_of(3), torch.arange(6000))
    shapes = Ranges((5, 9), (2, 4)).draw(Shape(9, 4, 1), 4, keys)
    counts = collections.Counter((shape.way, shape.shot) for shape in shapes)
    assert set(counts) == {(way, shot) for way in range(5, 10) for shot in range(2, 5)}
    # 15 equal cells: the chi-square statistic has 14 degrees of freedom, and exceeds 36 with 0.1%.
    assert sum((count - 400) ** 2 / 400 for count in counts.values()) < 36


def meta_dataset_shots(sizes, query, alphas, support_size):
    """Share a support set as Triantafillou et al. (2020), 3.2.2, step by step."""
    weights = [math.exp(alpha) * size for alpha, size in zip(alphas, sizes, strict=True)]
    shots = []
    for weight, size in zip(weights, sizes, strict=True):
        share = weight / sum(weights)
        shots.append(min(int(share * (support_size - len(sizes))) + 1, size - query))
    return shots


def test_unbalanced_shots_follow_the_formula_of_meta_dataset():
    numbers = random.Random(0)
    for _ in range(300):
        way, shot, size = numbers.randint(2, 50), numbers.randint(1, 40), numbers.randint(20, 90)
        uniform = [numbers.random() for _ in range(way)]
        alphas = [math.log(0.5) + one * (math.log(2) - math.log(0.5)) for one in uniform]
        support_size = max(way, min(500, way * shot))
        expected = meta_dataset_shots([size] * way, 10, alphas, support_size)
        own = unbalanced_shots(way, shot, size - 10, torch.tensor(uniform, dtype=torch.float64))
        assert list(own) == expected


def test_unbalanced_episodes_are_distributed_as_those_of_meta_dataset():
    """Their whole procedure for classes of one size, from beta to the shots."""
    numbers, size, way, query, episodes = random.Random(1), 30, 6, 10, 4000

    def theirs():
        room = min(100, size - query)
        beta = 1 - numbers.random()  # in (0, 1]
        support_size = min(500, sum(math.ceil(beta * room) for _ in range(way)))
        alphas = [numbers.uniform(math.log(0.5), math.log(2)) for _ in range(way)]
        return meta_dataset_shots([size] * way, query, alphas, support_size)

    keys = prng.fold_in(prng.key_of(5), torch.arange(episodes))
    ranges = Ranges((way, way), (1, size - query), True)
    shapes = ranges.draw(Shape(way, size - query, query), size - query, keys)
    own = torch.tensor([shape.shots for shape in shapes]).double()
    other = torch.tensor([theirs() for _ in range(episodes)]).double()
    for statistic in (
        lambda shots: shots.sum(-1),
        lambda shots: shots.amax(-1),
        lambda shots: shots.amin(-1),
        lambda shots: shots.std(-1),
        lambda shots: (shots == 1).double().mean(-1),
    ):
        a, b = statistic(own), statistic(other)
        error = math.sqrt((a.var() + b.var()) / episodes)
        assert abs(a.mean() - b.mean()) < 4 * error


def test_support_sets_are_unbalanced_and_query_sets_are_not(data):
    source = make_source(data, Ranges((3, 6), (1, 6), True))
    seen = set()
    for number, shape in enumerate(source.shapes(torch.arange(40))):
        task = source.draw(number, 1)
        assert tuple(task.support.y[0].bincount(minlength=shape.way).tolist()) == shape.shots
        assert task.query.y[0].bincount().tolist() == [3] * shape.way
        pairs = [tuple(pair) for part in (task.support, task.query)
                 for pair in class_and_image(part.x[0]).tolist()]  # fmt: skip
        assert len(set(pairs)) == sum(shape.shots) + 3 * shape.way
        for y in range(shape.way):  # a label is one class in both sets
            own = [class_and_image(part.x[0][part.y[0] == y])[:, 0]
                   for part in (task.support, task.query)]  # fmt: skip
            expected = source.classes(number, 1)[0, y] + 24  # after those of train and val
            assert torch.cat(own).unique().tolist() == [expected]
        seen.add(shape.shots)
    assert len(seen) > 20 and any(len(set(shots)) > 1 for shots in seen)


def test_copies_of_unbalanced_support_examples_keep_their_labels(data):
    shape = Shape(3, 4, 2, copies=2, shots=(4, 1, 2))
    task = data.episodes("test", shape, 0, lambda x, key: x).draw(0, 2)
    assert [row.bincount().tolist() for row in task.support.y] == [[8, 2, 4]] * 2
    plain = data.episodes("test", dataclasses.replace(shape, copies=0), 0).draw(0, 2)
    for one, other in zip(task.support.x, plain.support.x, strict=True):
        pairs = (class_and_image(x).tolist() for x in (one, other))
        copied, own = (collections.Counter(map(tuple, each)) for each in pairs)
        assert copied == {pair: 2 * count for pair, count in own.items()}


def test_the_shape_is_a_function_of_seed_split_and_number(data):
    ranges = Ranges((2, 5), (1, 4), True)
    source = make_source(data, ranges)
    assert source.shapes(torch.arange(9)) == make_source(data, ranges).shapes(torch.arange(9))
    for other in (make_source(data, ranges, seed=2), make_source(data, ranges, "val")):
        assert source.shapes(torch.arange(9)) != other.shapes(torch.arange(9))
    parts: Any = parts_of(source, 3, 20, 2)
    assert all(len(set(source.shapes(numbers))) == 1 and count <= 2 for numbers, count in parts)
    assert sorted(torch.cat([numbers for numbers, _ in parts]).tolist()) == list(range(3, 23))
    for numbers, count in parts:  # together as alone
        task = source.draw(numbers, count)
        for place, number in enumerate(numbers.tolist()):
            alone = source.draw(number, 1)
            assert torch.equal(task.query.x[place], alone.query.x[0])
            assert torch.equal(task.support.y[place], alone.support.y[0])
            assert torch.equal(source.classes(numbers, count)[place], source.classes(number, 1)[0])


def test_tasks_of_a_meta_batch_share_their_shape(monkeypatch, tmp_path):
    run = make(*_RANGES, "episode.unbalanced=true", "train.steps=6", "train.meta_batch=5")
    assert run.shapes_vary and "differ" in str(run.reason_not_captured)
    shapes = []
    step = type(run.train_engine).step

    def recording(engine, state, tasks, *rest):
        shapes.append(tuple(sorted(tasks.support.y[0].bincount().tolist())))
        for y in tasks.support.y:
            assert y.bincount().tolist() == tasks.support.y[0].bincount().tolist()
        assert len(tasks.key.unique()) == 5
        return step(engine, state, tasks, *rest)

    monkeypatch.setattr(type(run.train_engine), "step", recording)
    loop.fit(run, SILENT, tmp_path)
    assert len(set(shapes)) > 2
    again = [tuple(sorted(shape.shots)) for shape in run.train.shapes(5 * torch.arange(6))]
    assert shapes == again


@pytest.mark.parametrize("more", [[], ["episode.unbalanced=true"]])
def test_scores_do_not_depend_on_how_episodes_are_grouped(more, make_run):
    words = ["algo=protonet", *_RANGES, "test.episodes=40", *more]
    runs = [
        make_run(*words, f"engine.evaluation_batch={batch}", f"engine.features={features}")
        for batch, features in ((32, True), (1, True), (7, False))
    ]
    tested: list[Any] = [scoring.test(run, run.state, None) for run in runs]
    for other in tested[1:]:
        torch.testing.assert_close(other.scores, tested[0].scores)
        assert torch.equal(other.classes, tested[0].classes)
        assert torch.equal(other.correct, tested[0].correct)
    run = runs[0]
    for number in range(40):  # in order
        task = run.test.draw(number, 1)
        score = run.test_engine.scores(run.state, task)
        torch.testing.assert_close(score[0], tested[0].scores[number])
        asked = run.test.classes(number, 1)[0][task.query.y[0]]
        assert tested[0].classes[number, : len(asked)].tolist() == asked.tolist()
        assert (tested[0].classes[number, len(asked) :] == -1).all()


def test_accuracy_of_classes_counts_every_query_once(tmp_path):
    run = make(*_RANGES)
    result, scores = measure.measure(run, run.state, "x", {}, tmp_path / "test_")
    lines = (tmp_path / "test_classes.csv").read_text().splitlines()[1:]
    rows = [line.split(",") for line in lines]
    ways = [shape.way for shape in run.test.shapes(torch.arange(40))]
    assert sum(int(count) for _, _, count in rows) == 3 * sum(ways)
    right = sum(float(share) * int(count) for _, share, count in rows)
    expected = sum(float(s) * 3 * way for s, way in zip(scores, ways, strict=True))
    assert right == pytest.approx(expected, abs=1e-2)
    assert result.shape == "2-5w 1-4s 3q"


def test_protocol_covers_the_shapes_and_is_unchanged_without_ranges():
    plain = make().protocol
    assert plain["way"] == 5 and not {"unbalanced", "class_sampler"} & plain.keys()
    ids = [
        make(*words).protocol_id
        for words in (
            [], ["episode.way=[2,5]"], ["episode.way=[3,5]"], ["episode.shot=[1,2]"],
            ["episode.unbalanced=true"],
        )
    ]  # fmt: skip
    assert len(set(ids)) == len(ids)
    trained = ("episode.train.way=[2,5]", "episode.train.unbalanced=true")
    assert make(*trained).protocol_id == ids[0]


def test_regression_has_ranges_of_shots():
    run = make("dataset=sinusoid", "algo=maml", "episode.shot=[2,6]", "train.steps=1")
    sizes = {run.test.draw(number, 1).support.x.shape[1] for number in range(40)}
    assert sizes == set(range(2, 7))
    assert scoring.test(run, run.state, None).scores.isfinite().all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["episode.way=[20,5]"],
         "episode.way=[20, 5]: should be a number, or a range [low,high] with low <= high"),
        (["episode.train.shot=[1,2,3]"],
         "episode.train.shot=[1, 2, 3]: should be a number, or a range [low,high] with low <="),
        (["episode.way=[2,2.5]"], "episode.way[1]=2.5: should be a whole number"),
        (["episode.way=x"], "episode.way=x: should be a whole number"),
        (["episode.way=[]"], "episode.way=[]: should be a number, or a range [low,high] with low"),
        (["episode.shot=[0,2]"], "episode.shot=[0, 2]: should be at least 1"),
        (["episode.way=[1,5]"], "way=1: a task needs at least 2 classes"),
        (["episode.way=[5,50]"], "test episodes: way=50, but the split has only 20 classes"),
        (["episode.train.way=[5,500]"],
         "train episodes: way=500, but the split has only 60 classes; lower episode.train.way"),
        (["episode.shot=[1,30]"], "shot + query = 33, but class 'class00"),
        (["algo=maml", "episode.way=[2,5]"],
         "episode.way=[2, 5]: the number of ways is part of MAML's weights; use one number"),
        (["algo=maml", "episode.train.way=[2,5]"],
         "episode.train.way=[2, 5] should equal episode.way=5"),
        (["dataset=sinusoid", "algo=maml", "episode.unbalanced=true"],
         "episode.unbalanced=true: this dataset has no classes; leave it out"),
    ],
)  # fmt: skip
def test_impossible_ranges_are_refused_in_one_line(words, message):
    with pytest.raises(UserError) as caught:
        make(*words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_method_can_require_equal_shots(monkeypatch):
    monkeypatch.setattr(ProtoNet, "needs_equal_shots", True)
    with pytest.raises(UserError, match=r"unbalanced=true: ProtoNet requires as many support"):
        make("episode.unbalanced=true")


def test_prototypes_are_means_of_unequal_classes():
    run = make("episode.unbalanced=true", "episode.shot=4")
    task = run.test.draw(0, 1)
    support = dataclasses.replace(task.support, x=task.support.x[0], y=task.support.y[0])
    learner = run.algorithm.adapt(run.state, support, key=task.key[0])
    z, _ = run.algorithm.normalisation.embed_support(run.state, support.x)
    assert len(set(support.y.bincount().tolist())) > 1
    for y in range(5):
        torch.testing.assert_close(learner.head[y], z[support.y == y].mean(0))
