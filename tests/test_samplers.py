"""How the classes of episodes are chosen: by superclass, by recent error, and in mixed datasets."""

import collections
import dataclasses
import json
from typing import Any, cast

import pytest
import torch
from same_run import difference

from metalearn.config import checking, components, composition
from metalearn.data.class_splits import published_superclasses
from metalearn.data.glyphs import Glyphs
from metalearn.data.images import ClassImages, ImageDataset
from metalearn.data.mix import Mix
from metalearn.report.progress import SILENT
from metalearn.run import checkpoint, loop
from metalearn.run.build import build
from metalearn.run.step import Training
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.sampling import Shape
from tests.fixtures import SMALL
from tests.test_episodes import class_and_image, numbered_data, upright
from tests.test_processes import end

_CPU = torch.device("cpu")

# Hierarchical.


def with_superclasses(sizes, rotations="none"):
    """Make data whose training classes are in superclasses of these sizes, as 0, 1, 2, …"""
    numbers = [number for number, size in enumerate(sizes) for _ in range(size)]
    names = {f"train{place}": f"super{number}" for place, number in enumerate(numbers)}
    names |= {f"{split}{number}": "other" for split in ("val", "test") for number in range(5)}
    counts = {"train": [6] * len(numbers), "val": [6] * 5, "test": [6] * 5}
    return numbered_data(counts, rotations, superclass_of=names), torch.tensor(numbers)


def test_all_classes_of_an_episode_are_of_one_superclass():
    data, number = with_superclasses([3, 5, 2, 4, 6])
    source = data.episodes("train", Shape(4, 1, 2, sampler="hierarchical"), 0)
    drawn = number[source.classes(0, 3000)]
    assert (drawn == drawn[:, :1]).all()
    task = source.draw(0, 20)
    assert torch.equal(number[class_and_image(task.query.x)[..., 0]][:, 0], drawn[:20, 0])
    counts = drawn[:, 0].bincount(minlength=5)
    assert not counts[[0, 2]].any()  # too small
    assert (counts[[1, 3, 4]] - 1000).abs().max() < 110  # 4 standard deviations of 1/3
    # Within a superclass, each class is as frequent.
    own = source.classes(0, 3000)[drawn[:, 0] == 4].flatten().bincount(minlength=20)[14:]
    assert (own - own.float().mean()).abs().max() < 4 * own.float().mean().sqrt()
    assert all(len(row.unique()) == 4 for row in source.classes(0, 50))


def test_distractors_are_of_the_same_superclass_and_count():
    data, number = with_superclasses([3, 5, 2, 4, 6])
    source = data.episodes("train", Shape(3, 1, 1, 2, 3, sampler="hierarchical"), 0)
    task = source.draw(0, 30)
    assert (number[class_and_image(task.support.unlabelled)[..., 0]] == 4).all()


def test_rotated_classes_are_of_the_superclass_of_their_class():
    data, number = with_superclasses([2, 3], "classes")
    task = data.episodes("train", Shape(9, 1, 1, sampler="hierarchical"), 0).draw(0, 20)
    for x in task.support.x:  # only 4 x 3 classes suffice
        assert (number[class_and_image(upright(x))[:, 0]] == 1).all()


def test_too_small_or_missing_superclasses_are_refused():
    data, _ = with_superclasses([3, 5])
    with pytest.raises(UserError) as caught:
        data.episodes("train", Shape(6, 1, 1, sampler="hierarchical"), 0)
    assert str(caught.value) == (
        "train episodes: way=6, but 'super1', the largest superclass, has only 5 classes; lower "
        "episode.way"
    )
    data = numbered_data({"train": [6] * 6, "val": [6] * 5, "test": [6] * 5})
    with pytest.raises(UserError, match=r"the classes of this dataset have no superclasses; use"):
        data.episodes("test", Shape(2, 1, 1, sampler="hierarchical"), 0)


def test_hierarchical_episodes_are_another_protocol(make_run, tmp_path):
    lines = [f"text {row} {row % 7},label{row % 30},domain{row % 3}" for row in range(600)]
    (tmp_path / "toy.csv").write_text("\n".join(lines))
    words = [
        "algo=protonet", "dataset=text", f"dataset.path={tmp_path}/toy.csv", "logger=none",
        "backbone.width=8", "episode.way=2", "episode.query=3", "test.episodes=20",
    ]  # fmt: skip

    def run(*more):
        return build(checking.check_config(composition.compose_config([*words, *more])))

    plain, by_domain = run(), run("episode.sampler=hierarchical")
    trained = run("episode.train.sampler=hierarchical")
    assert plain.protocol_id == trained.protocol_id != by_domain.protocol_id
    assert by_domain.protocol["class_sampler"] == "hierarchical"
    for source, split in ((by_domain.test, "test"), (trained.train, "train")):
        names = source.view.index.names
        domains = [int(name.removeprefix("label")) % 3 for name in names]
        drawn = torch.tensor(domains)[source.classes(0, 20)]
        assert (drawn == drawn[:, :1]).all(), split


def test_classes_of_cifar100_have_their_superclasses():
    known = published_superclasses(["seal", "dolphin"])
    assert known["seal"] == known["dolphin"] == "aquatic_mammals" and len(known) == 100
    assert set(collections.Counter(known.values()).values()) == {5}
    assert published_superclasses(["seal", "submarine"]) == {}


# Hard.


def test_weighted_draws_have_the_probabilities_of_successive_draws():
    weights, draws = torch.tensor([1.0, 2, 3, 0, 4]).double(), 20000
    keys = prng.fold_in(prng.key_of(1), torch.arange(draws))
    drawn = prng.weighted(keys, weights, 2)
    counts = collections.Counter(map(tuple, drawn.tolist()))
    for first in range(5):
        for second in range(5):
            p = float(weights[first] * weights[second] / 10 / (10 - weights[first]))
            p = 0.0 if first == second else p
            error = (p * (1 - p) / draws) ** 0.5
            assert abs(counts[first, second] / draws - p) <= 4.5 * error


def test_classes_with_errors_are_drawn_more_often():
    data = numbered_data({"train": [6] * 10, "val": [6] * 5, "test": [6] * 5})
    source = data.episodes("train", Shape(2, 1, 1, sampler="hard"), 0)
    before = source.classes(0, 4000).flatten().bincount(minlength=10)
    assert (before - 800).abs().max() < 110
    assert source.view.chooser.hard is not None
    source.view.chooser.hard.errors.copy_(torch.tensor([0.9] + [0.0] * 9))
    after = source.classes(0, 4000)[:, 0].bincount(minlength=10)
    # Weights 1 and 9 times 0.1: the first class of an episode is class 0 with probability 1 / 1.9.
    assert abs(after[0] / 4000 - 1 / 1.9) < 0.04


def make_hard(*words):
    small = [
        "algo=protonet", "dataset=gaussians", "dataset.nuisance_std=2", "backbone.hidden=[8]",
        "episode.query=3", "train.steps=4", "train.meta_batch=3", "val.episodes=2",
        "test.episodes=4", "logger=none", "device=cpu", "episode.train.sampler=hard",
    ]  # fmt: skip
    return build(checking.check_config(composition.compose_config([*small, *words])))


@pytest.mark.parametrize(
    "words",
    [[], ["episode.train.way=[2,7]", "episode.train.unbalanced=true"], ["+augment.mix.mixup={}"],
     *(pytest.param(words, marks=pytest.mark.slow) for words in (
         ["algo=reptile"], ["algo=relation"], ["algo=maml_pp"], ["algo=imaml"],
         ["engine.strategy=vmap", "engine.task_chunk=2"]))],
    ids=lambda words: " ".join(words) or "protonet",
)  # fmt: skip
def test_recent_errors_are_a_moving_average_of_those_of_the_queries(words, monkeypatch):
    run = make_hard(*words)
    training = Training(run)
    assert run.hard_classes is not None
    errors = torch.ones(60)
    for step in range(3):
        first = 3 * step
        if not run.shapes_vary:
            torch.testing.assert_close(training._steps_done, torch.tensor(step))
        tasks, classes = run.train.draw(first, 3), run.train.classes(first, 3)
        wrong, asked = torch.zeros(60), torch.zeros(60)
        seen: list[Any] = []
        make_loss = type(run.family).make_loss

        def recording(family, value, prediction, y, statistics, make_loss=make_loss, seen=seen):
            seen.append((prediction.detach(), y))
            return make_loss(family, value, prediction, y, statistics)

        with monkeypatch.context() as patch:
            patch.setattr(type(run.family), "make_loss", recording)
            one_by_one = dataclasses.replace(training.engine, strategy="loop", chunk=1)
            one_by_one.step(training.state, tasks, torch.tensor(step / 4))
        if len(seen) > 3:  # of several inner steps, the last counts
            seen = seen[len(seen) // 3 - 1 :: len(seen) // 3]
        for (prediction, y), own in zip(seen, classes, strict=True):
            labels = y if y.dim() == 1 else y.argmax(-1)
            for query, label in enumerate(labels.tolist()):
                asked[own[label]] += 1
                wrong[own[label]] += float(prediction[query].argmax() != label)
        training.meta_step()
        training.count()
        for number in range(60):
            if asked[number]:
                errors[number] += 0.1 * (wrong[number] / asked[number] - errors[number])
        torch.testing.assert_close(run.hard_classes.errors, errors)
    assert 0 < (errors < 1).sum() < 60


def test_a_step_that_is_not_finite_changes_no_error():
    run = make_hard("train.nonfinite=skip")
    training = Training(run)
    for value in run.state.params.values():
        value.fill_(torch.nan)
    training.meta_step()
    assert (run.hard_classes.errors == 1).all()


@pytest.mark.parametrize("more", [[], ["episode.train.way=[2,7]"]])
def test_resumed_hard_training_equals_an_uninterrupted_one(more, tmp_path):
    words = ["train.steps=6", "checkpoint.every=2", "val.every=3", *more]
    for name in ("full", "part"):
        (tmp_path / name).mkdir()
    loop.fit(make_hard(*words), SILENT, tmp_path / "full")
    last = checkpoint.load(tmp_path / "full/checkpoints/last.pt", _CPU)
    assert last["class_errors"].unique().numel() > 2

    class Halted(BaseException):
        pass

    meta_step = Training.meta_step

    def halting(training):
        if training.step == 5:
            raise Halted
        meta_step(training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "meta_step", halting)
        with pytest.raises(Halted):
            loop.fit(make_hard(*words), SILENT, tmp_path / "part")
    stored = checkpoint.load(tmp_path / "part/checkpoints/last.pt", _CPU)
    assert stored["step"] == 4
    loop.fit(make_hard(*words), SILENT, tmp_path / "part", stored)
    again = checkpoint.load(tmp_path / "part/checkpoints/last.pt", _CPU)
    for part in ("meta", "fixed", "class_errors"):
        assert difference(again[part], last[part]) is None


@pytest.mark.slow
def test_two_processes_draw_the_hard_classes_of_one(metalearn, ranks, tmp_path):
    arguments = [
        "train", "algo=protonet", *SMALL, "train.meta_batch=5", "train.steps=20", "val.every=20",
        "train.optimiser=sgd", "train.lr=0.01", "episode.train.sampler=hard",
        "episode.train.way=[3,6]", "episode.way=[2,5]", "test.episodes=9",
    ]  # fmt: skip
    command = end(ranks(*arguments, "hydra.run.dir=two"))
    assert command.returncode == 0, command.stderr
    assert metalearn(*arguments, "hydra.run.dir=one").returncode == 0
    one, two = (
        torch.load(tmp_path / name / "checkpoints/last.pt", weights_only=True)
        for name in ("one", "two")
    )
    assert one["class_errors"].unique().numel() > 2
    torch.testing.assert_close(one["class_errors"], two["class_errors"])
    torch.testing.assert_close(one["meta"], two["meta"], rtol=1e-3, atol=1e-4)
    scores = [(tmp_path / name / "test_scores.csv").read_text() for name in ("one", "two")]
    assert scores[0].count("\n") == 10
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    means = [result["test"]["accuracy"]["mean"] for result in results]
    assert means[0] == pytest.approx(means[1], abs=0.02)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["episode.sampler=hard"], "so not in tests; use episode.train.sampler=hard"),
        (["algo=rfs"], "trains on no episodes; leave it out"),
        (["dataset=sinusoid", "algo=maml"], "this dataset has no classes; leave it out"),
        (["episode.train.sampler=hardest"], "should be one of uniform, hierarchical, hard"),
    ],
)
def test_hard_sampling_elsewhere_is_refused(words, message):
    words = [word for word in words if "nuisance" not in word]
    base = ["backbone.hidden=[8]", "logger=none", "episode.train.sampler=hard", *words]
    own = [word for word in ("algo=protonet", "dataset=gaussians") if word.partition("=")[0] not in
           {one.partition("=")[0] for one in words}]  # fmt: skip
    with pytest.raises(UserError) as caught:
        build(checking.check_config(composition.compose_config([*own, *base])))
    assert message in str(caught.value) and "\n" not in str(caught.value)


# Mixed datasets.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbered(ImageDataset):
    """Images that encode their class, from `first` on, and their number."""

    first: int
    standardise: bool = False

    def open(self, data_dir, cache_dir, device):
        names = [f"{split}{number}" for split in ("train", "val", "test") for number in range(6)]
        images = torch.tensor(
            [[[[self.first + c, i], [255, 0]]] for c in range(18) for i in range(7)],
            dtype=torch.uint8,
        )
        splits = {split: [name for name in names if name.startswith(split)]
                  for split in ("train", "val", "test")}  # fmt: skip
        groups = {name: f"group{place % 2}" for place, name in enumerate(names)}
        hashes = [10 * (self.first + c) + i for c in range(18) for i in range(7)]
        own = ClassImages(images, [7] * 18, names, hashes=torch.tensor(hashes))
        return self.class_data(own, splits, device, self.standardise, groups)


def mixed(tmp_path, rotations="none", standardise=(False, False), firsts=(0, 100)):
    sets = {
        name: Numbered(first=first, standardise=own, rotations=rotations, rotations_may_meet=True)
        for name, first, own in zip("ab", firsts, standardise, strict=True)
    }
    mix = Mix(parts=["a", "b"], settings={}, sets=sets)
    return mix.open(tmp_path, tmp_path, _CPU)


@pytest.mark.parametrize("sampler", ["uniform", "hierarchical", "hard"])
@pytest.mark.parametrize("rotations", ["none", "classes", "episode"])
def test_no_episode_crosses_the_parts_of_a_mix(rotations, sampler, tmp_path):
    data = mixed(tmp_path, rotations)
    shape = Shape(3, 1, 2, 1, sampler=sampler)
    for split, offset in (("train", 0), ("val", 6), ("test", 12)):
        task = data.episodes(split, shape, 0).draw(0, 200)
        x = torch.cat([task.support.x, task.query.x, task.support.unlabelled], 1)
        classes = torch.stack([class_and_image(upright(one))[:, 0] for one in x])
        parts = classes // 100
        assert (parts == parts[:, :1]).all()
        assert 60 < (parts[:, 0] == 0).sum() < 140
        within = classes % 100 - offset
        assert within.min() >= 0 and within.max() < 6
        if sampler == "hierarchical":
            assert ((within + offset) % 2 == (within[:, :1] + offset) % 2).all()
        for y in range(3):  # labels are those of the images
            own = classes[:, :3][task.support.y == y]
            assert torch.equal(classes[:, 3:9][task.query.y == y].view(-1, 2)[:, 0], own)


def test_classes_of_a_mix_are_named_by_their_part_and_batches_have_all(tmp_path):
    data = mixed(tmp_path)
    assert data.class_names("val") == tuple(f"{part}/val{n}" for part in "ab" for n in range(6))
    batch = data.batches("train", 500, 0).draw(0, 1)
    classes = class_and_image(batch.x)[0, :, 0]
    assert torch.equal(batch.y[0], classes % 100 + 6 * (classes // 100))
    everything = data.with_split("all").episodes("all", Shape(5, 1, 1), 0).draw(0, 50)
    parts = class_and_image(everything.query.x)[..., 0] // 100
    assert (parts == parts[:, :1]).all() and parts.unique().numel() == 2


def test_images_that_one_part_trains_on_and_another_tests_on_are_refused(tmp_path):
    assert len(mixed(tmp_path, firsts=(0, 0)).class_names("train")) == 12  # the same splits
    for firsts, first, later in (((0, 12), "b", "a"), ((17, 0), "a", "b")):
        with pytest.raises(UserError) as caught:
            mixed(tmp_path, firsts=firsts)
        text = f"dataset.parts: images of the train split of {first} are in the test split of"
        assert f"{text} {later} (" in str(caught.value)


def test_a_mix_is_standardised_by_all_training_images(tmp_path):
    data = mixed(tmp_path, standardise=(True, False))
    rows = data.views["train"].index.rows
    for split in ("train", "test"):
        x = data.stores[split].gather(rows, torch.zeros(len(rows), dtype=torch.int64))
        assert abs(x.mean()) < 1e-5 and abs(x.square().mean() - 1) < 1e-5
    shift, scale = data.standardisation["shift"][0], data.standardisation["scale"][0]
    store = data.stores["train"]
    torch.testing.assert_close(x, (store.load(rows) - shift) * scale)
    assert data.stores["val"].images is data.stores["train"].images


def glyphs(**changes):
    settings = checking.check_config(composition.compose_config(["dataset=glyphs"])).dataset
    own = {"num_classes": 40, "image_size": 8, "fractions": [0.5, 0.25, 0.25], **changes}
    return {**settings, **own}


def test_a_mix_trains_from_the_command_line_settings(tmp_path):
    words = [
        "dataset=mix", "dataset.parts=[glyphs,gaussians]", "+dataset.settings={data_seed: 3, "
        "glyphs: {num_classes: 50}}",
    ]  # fmt: skip
    config = checking.check_config(composition.compose_config(words))
    sets = config.dataset["sets"]
    assert sets["glyphs"]["num_classes"] == 50 and sets["gaussians"]["num_classes"] == 100
    assert sets["gaussians"]["data_seed"] == 3
    made = components.make(config.dataset, "dataset", raw=True)
    assert cast(Glyphs, made.sets["glyphs"]).raw
    again = composition.OmegaConf.create(checking.plain(config))
    assert checking.check_config(again).dataset == config.dataset


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"a": glyphs(), "b": glyphs(image_size=9)},
         "a has images of 8x8 pixels, b has images of 9x9 pixels; use +dataset.settings={"),
        ({"a": glyphs(), "b": glyphs(rotations="none")},
         "a has rotations=classes in train, b has rotations=none in train; use +dataset"),
        ({"a": glyphs(), "b": {"_target_": "metalearn.data.gaussians.Gaussians"}},
         "a has images, b has features; choose datasets of one kind of input"),
        ({"a": glyphs(), "b": {"_target_": "metalearn.data.sinusoid.Sinusoid"}},
         "b has no classes; choose another"),
        ({"a": glyphs()}, "should be two or more different datasets"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(sets, message, tmp_path):
    for name in ("gaussians", "sinusoid"):
        settings = checking.check_config(composition.compose_config([f"dataset={name}"])).dataset
        for part, one in sets.items():
            if one["_target_"] == settings["_target_"]:
                sets[part] = settings
    node = {"_target_": "metalearn.data.mix.Mix", "parts": list(sets), "settings": {}, "sets": sets}
    with pytest.raises(UserError) as caught:
        components.make(node, "dataset").open(tmp_path, tmp_path, _CPU)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("dataset.parts=[glyphs,glyfs]", "dataset=glyfs: there is no such dataset; there are"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (
                    "+dataset.settings={jiter: 1}",
                    "no part has such a setting; did you mean jitter?",
                ),
                (
                    "+dataset.settings={glyphs: {jiter: 1}}",
                    "dataset.sets.glyphs.jiter: there is no such setting; did you mean",
                ),
                (
                    "+dataset.settings={jitter: -1}",
                    "dataset.sets.glyphs.jitter=-1.0: should be at least 0",
                ),
            )
        ),
    ],
)
def test_mistakes_in_the_settings_of_parts_are_refused(word, message):
    with pytest.raises(UserError) as caught:
        checking.check_config(composition.compose_config(["dataset=mix", word]))
    assert message in str(caught.value) and "\n" not in str(caught.value)
