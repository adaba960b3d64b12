"""Contents of episodes and batches."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metalearn.data.classes import ClassData
from metalearn.data.images import ClassImages, ImageDataset
from metalearn.system.errors import UserError
from metalearn.tasks.sampling import Shape

_CPU = torch.device("cpu")


def numbered_data(
    counts: dict[str, list[int]],
    rotations: str = "none",
    may_meet: bool = True,
    share_drawings: bool = True,
    superclass_of: dict[str, str] = {},  # noqa: B006
) -> ClassData:
    """Make a dataset of 2x2 images that encode (class, image; 255, 0)."""
    names = [f"{split}{index}" for split, sizes in counts.items() for index in range(len(sizes))]
    sizes = [size for each in counts.values() for size in each]
    images = torch.stack(
        [
            torch.tensor([[[c, i], [255, 0]]], dtype=torch.uint8)
            for c, size in enumerate(sizes)
            for i in range(size)
        ]
    )
    splits = {
        split: [f"{split}{index}" for index in range(len(each))] for split, each in counts.items()
    }
    settings = ImageDataset(
        rotations=rotations, rotations_may_meet=may_meet, rotations_share_drawings=share_drawings
    )
    own = ClassImages(images, sizes, names)
    return settings.class_data(own, splits, _CPU, superclass_of=superclass_of)


def class_and_image(x: torch.Tensor) -> torch.Tensor:
    """Decode unrotated images [..., 1, 2, 2] to (class, image) [..., 2]."""
    return (x[..., 0, 0, :] * 255).round().long()


def rotations_of(x: torch.Tensor) -> torch.Tensor:
    """Return rotations by 90 degrees of images [..., 1, 2, 2], by their white pixel."""
    # Counter-clockwise from the lower left, where the white pixel is before any rotation.
    corners = torch.stack([x[..., 0, 1, 0], x[..., 0, 1, 1], x[..., 0, 0, 1], x[..., 0, 0, 0]], -1)
    return corners.argmax(-1)


def upright(x: torch.Tensor) -> torch.Tensor:
    """Undo the rotations of images [B, 1, 2, 2]."""
    return torch.stack(
        [
            image.rot90(-int(rotation), (-2, -1))
            for image, rotation in zip(x, rotations_of(x), strict=True)
        ]
    )


@settings(max_examples=60, deadline=None)
@given(
    rotations=st.sampled_from(["none", "classes", "episode"]),
    sizes=st.lists(st.integers(4, 9), min_size=5, max_size=12),
    way=st.integers(2, 5), shot=st.integers(1, 2), query=st.integers(1, 2),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_support_and_query_share_no_image(rotations, sizes, way, shot, query, seed):
    data = numbered_data({"train": sizes, "val": [4] * 5, "test": [4] * 5}, rotations)
    task = data.episodes("train", Shape(way, shot, query), seed).draw(0, 6)
    for t in range(6):
        parts: dict[str, Any] = {"support": task.support, "query": task.query}
        entries_of = {
            name: [
                (y, rotation, cls, image)
                for y, rotation, (cls, image) in zip(
                    part.y[t].tolist(),
                    rotations_of(part.x[t]).tolist(),
                    class_and_image(upright(part.x[t])).tolist(),
                    strict=True,
                )
            ]
            for name, part in parts.items()
        }
        all_entries = entries_of["support"] + entries_of["query"]
        num_distinct = len({entry[1:] for entry in all_entries})
        assert num_distinct == way * (shot + query)
        images = {name: {entry[2:] for entry in entries} for name, entries in entries_of.items()}
        assert not images["support"] & images["query"]  # not even rotated
        assert all(image < sizes[cls] for _, _, cls, image in all_entries)  # no padding
        # A label is one class in support and query, and each class has its number of examples.
        classes: dict[int, tuple[int, int]] = {}
        for y, rotation, cls, _ in all_entries:
            assert classes.setdefault(y, (cls, rotation)) == (cls, rotation)
        assert len(set(classes.values())) == way
        assert torch.equal(task.support.y[t].bincount(minlength=way), torch.full((way,), shot))
        assert torch.equal(task.query.y[t].bincount(minlength=way), torch.full((way,), query))


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    way=st.integers(2, 4), shot=st.integers(1, 2), query=st.integers(1, 2),
    unlabelled=st.integers(1, 3), distractors=st.integers(0, 3), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_unlabelled_examples_are_new_images_of_the_same_classes_and_of_distractors(
    way, shot, query, unlabelled, distractors, seed
):
    data = numbered_data({"train": [7] * 8, "val": [4] * 5, "test": [4] * 5})
    task = data.episodes("train", Shape(way, shot, query, unlabelled, distractors), seed).draw(0, 5)
    assert task.support.unlabelled is not None
    for t in range(5):
        labelled = [
            tuple(row)
            for part in (task.support, task.query)
            for row in class_and_image(part.x[t]).tolist()
        ]
        unlabelled_images = [
            tuple(row) for row in class_and_image(task.support.unlabelled[t]).tolist()
        ]
        assert len({*labelled, *unlabelled_images}) == (
            way * (shot + query) + (way + distractors) * unlabelled
        )
        classes = [cls for cls, _ in unlabelled_images]
        assert {classes.count(cls) for cls in classes} == {unlabelled}
        assert {cls for cls, _ in labelled} <= set(classes)
        assert len(set(classes)) == way + distractors
    plain = data.episodes("train", Shape(way, shot, query), seed).draw(0, 5)
    if not distractors:  # unlabelled examples do not change the rest of the episode
        assert torch.equal(plain.query.x, task.query.x)


@pytest.mark.parametrize("share_drawings", [True, False])
def test_rotations_of_one_class_share_images_if_set(share_drawings):
    data = numbered_data(
        {"train": [9] * 2, "val": [4] * 5, "test": [4] * 5}, "classes", True, share_drawings
    )
    task = data.episodes("train", Shape(5, 1, 1), 0).draw(0, 60)
    num_met, num_shared = 0, 0
    for x in task.support.x:
        images = [tuple(one) for one in class_and_image(upright(x)).tolist()]
        for index, (cls, image) in enumerate(images):
            for other, other_image in images[index + 1 :]:
                num_met += cls == other
                num_shared += (cls, image) == (other, other_image)
    assert num_met > 100
    assert num_shared == num_met if share_drawings else num_shared < num_met / 4


def test_task_depends_only_on_its_number():
    source = numbered_data({"train": [6] * 9, "val": [6] * 5, "test": [6] * 5}).episodes(
        "train", Shape(5, 1, 2), 7
    )
    together = source.draw(0, 8)
    apart = [source.draw(first, 2) for first in (0, 2, 4, 6)]
    assert torch.equal(together.query.x, torch.cat([part.query.x for part in apart]))
    assert torch.equal(together.key, torch.cat([part.key for part in apart]))
    assert together.key.unique().numel() == 8


def test_splits_have_separate_classes_and_random_streams():
    data = numbered_data({"train": [6] * 6, "val": [6] * 6, "test": [6] * 6})
    tasks = {
        split: data.episodes(split, Shape(5, 1, 2), 0).draw(0, 50)
        for split in ("train", "val", "test")
    }
    classes = {
        split: set(class_and_image(task.query.x)[..., 0].flatten().tolist())
        for split, task in tasks.items()
    }
    assert classes == {"train": set(range(6)), "val": set(range(6, 12)), "test": set(range(12, 18))}
    assert not torch.equal(tasks["val"].query.y, tasks["test"].query.y)


def test_queries_are_not_ordered_by_class():
    task = (
        numbered_data({"train": [20] * 6, "val": [6] * 5, "test": [6] * 5})
        .episodes("train", Shape(5, 1, 10), 0)
        .draw(0, 40)
    )
    share = (task.query.y[:, :10] == 0).float().mean()
    assert 0.1 < share < 0.3


@pytest.mark.parametrize("rotations", ["train_classes", "classes", "episode", "none"])
def test_rotations_by_split(rotations):
    data = numbered_data({"train": [4] * 5, "val": [4] * 5, "test": [4] * 5}, rotations)
    for split in ("train", "test"):
        rotates_classes = rotations == "classes" or (
            rotations == "train_classes" and split == "train"
        )
        assert data.num_classes(split) == (20 if rotates_classes else 5)
        task = data.episodes(split, Shape(5, 1, 2), 0).draw(0, 60)
        rotation_ids = rotations_of(task.query.x)
        if not rotates_classes and rotations != "episode":
            assert not rotation_ids.any()
            continue
        assert set(rotation_ids.flatten().tolist()) == {0, 1, 2, 3}
        # In an episode, all support and query examples of a class have the same rotation.
        for t in range(60):
            for y in range(5):
                class_rotations = torch.cat(
                    [
                        rotation_ids[t][task.query.y[t] == y],
                        rotations_of(task.support.x[t])[task.support.y[t] == y],
                    ]
                )
                assert class_rotations.unique().numel() == 1


@pytest.mark.parametrize("may_meet", [True, False])
def test_rotations_of_one_class_meet_only_if_allowed(may_meet):
    data = numbered_data({"train": [4] * 6, "val": [4] * 5, "test": [4] * 5}, "classes", may_meet)
    x = data.episodes("train", Shape(5, 1, 1), 0).draw(0, 100).support.x
    meets = [len(set(class_and_image(upright(task))[:, 0].tolist())) < 5 for task in x]
    assert any(meets) == may_meet


def test_batches_have_global_labels():
    data = numbered_data({"train": [4, 7, 5], "val": [4] * 5, "test": [4] * 5}, "train_classes")
    batch = data.batches("train", 300, 0).draw(0, 2)
    assert batch.x.shape == (2, 300, 1, 2, 2)
    rotation_ids = rotations_of(batch.x)
    pairs = class_and_image(torch.stack([upright(row) for row in batch.x]))
    assert torch.equal(batch.y, pairs[..., 0] + 3 * rotation_ids)
    assert batch.y.unique().numel() == 12
    share = (pairs[..., 0] == 1).float().mean()
    assert abs(share - 7 / 16) < 0.1  # images are uniform, so larger classes are more frequent


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Shape(1, 1, 1), "way=1: a task needs at least 2 classes; choose 2 or more"),
        (Shape(6, 1, 1), "way=6, but the split has only 5 classes; lower episode.way"),
        (
            Shape(5, 2, 3, where="episode.train"),
            "shot + query = 5, but class 'train1' has only 4 examples; "
            "lower episode.train.query or episode.train.shot",
        ),
        (
            Shape(5, 1, 2, unlabelled=2),
            "shot + query + unlabelled = 5, but class 'train1' has only 4 examples; "
            "lower episode.unlabelled or episode.query or episode.shot",
        ),
        (
            Shape(4, 1, 1, unlabelled=1, distractors=2),
            "way + distractors = 6, but the split has only 5 classes; "
            "lower episode.distractors or episode.way",
        ),
        (
            Shape(2, 1, 1, distractors=1),
            "distractors=1: requires unlabelled examples; set episode.unlabelled",
        ),
    ],
)
def test_impossible_shapes_are_refused(shape, message):
    data = numbered_data({"train": [9, 4, 9, 9, 9], "val": [4] * 5, "test": [4] * 5})
    with pytest.raises(UserError) as caught:
        data.episodes("train", shape, 0)
    assert str(caught.value) == f"train episodes: {message}"


@pytest.mark.parametrize("sampler", ["uniform", "hierarchical", "hard"])
@pytest.mark.parametrize("rotations", ["none", "classes", "episode"])
def test_sampling_reads_no_value_on_the_host(rotations, sampler):
    """On torch's `meta` device, reading a value or a tensor on a different device is an error."""
    names = [f"{split}{number}" for split in ("train", "val", "test") for number in range(8)]
    data = numbered_data(
        {"train": [9] * 8, "val": [4] * 5, "test": [4] * 5},
        rotations,
        superclass_of={name: name[:-1] for name in names},
    )
    meta = torch.device("meta")

    def moved(tree):
        if isinstance(tree, torch.Tensor):
            return tree.to(meta)
        if not dataclasses.is_dataclass(tree) or isinstance(tree, type):
            return tree
        fields = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
        return dataclasses.replace(tree, **{name: moved(one) for name, one in fields.items()})

    def to_meta(sampler):
        store, view = sampler.store, sampler.view
        index = dataclasses.replace(
            view.index, rows=view.index.rows.to(meta), counts=view.index.counts.to(meta)
        )
        # Copy the cached property, which the sampler may have read.
        index.__dict__["num_inputs"] = view.index.__dict__.get("num_inputs")
        parts = {name: getattr(store, name).to(meta) for name in ("images", "shift", "scale")}
        copied = copy.copy(sampler)
        changes = {
            "store": dataclasses.replace(store, **parts),
            "view": dataclasses.replace(view, index=index, chooser=moved(view.chooser)),
            "key": sampler.key.to(meta),
        }
        for name, value in changes.items():
            object.__setattr__(copied, name, value)
        return copied

    number = torch.zeros((), dtype=torch.int64, device=meta)
    shape = Shape(5, 1, 2, unlabelled=2, distractors=1, sampler=sampler)
    source = to_meta(data.episodes("train", shape, 0))
    task = source.draw(number, 4)
    if sampler == "hard":
        assert source.classes(number, 4).device == meta
        counts = torch.zeros(2, 8, device=meta)
        source.view.chooser.hard.record(*counts, torch.tensor(True, device=meta))
    assert task.query.x.shape == (4, 10, 1, 2, 2) and task.query.x.device == meta
    assert to_meta(data.batches("train", 16, 0)).draw(number, 3).y.device == meta
