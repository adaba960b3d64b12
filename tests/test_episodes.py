"""What an episode may and may not hold."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metalearn.data.base import ClassData
from metalearn.data.images import ImageDataset, Pictures
from metalearn.errors import UserError
from metalearn.tasks.sampling import Shape

_CPU = torch.device("cpu")


def numbered(
    counts: dict[str, list[int]],
    rotations: str = "none",
    may_meet: bool = True,
    share_drawings: bool = True,
) -> ClassData:
    """A dataset whose every image shows its own number, in 2 x 2 pixels: (class, image; 0, 0)."""
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
    return settings.class_data(Pictures(images, sizes, names), splits, _CPU)


def identity(x: torch.Tensor) -> torch.Tensor:
    """(class, image) of unturned pictures [..., 1, 2, 2] -> [..., 2]."""
    return (x[..., 0, 0, :] * 255).round().long()


def turns_of(x: torch.Tensor) -> torch.Tensor:
    """Quarter turns of numbered pictures [..., 1, 2, 2]: where the white pixel went from the lower left."""
    corners = torch.stack([x[..., 0, 1, 0], x[..., 0, 1, 1], x[..., 0, 0, 1], x[..., 0, 0, 0]], -1)
    return corners.argmax(-1)


def upright(x: torch.Tensor) -> torch.Tensor:
    """The same pictures [B, 1, 2, 2], turned back."""
    return torch.stack(
        [picture.rot90(-int(turn), (-2, -1)) for picture, turn in zip(x, turns_of(x), strict=True)]
    )


@settings(max_examples=60, deadline=None)
@given(
    rotations=st.sampled_from(["none", "classes", "episode"]),
    sizes=st.lists(st.integers(4, 9), min_size=5, max_size=12),
    way=st.integers(2, 5), shot=st.integers(1, 2), query=st.integers(1, 2), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_support_and_query_share_no_image(rotations, sizes, way, shot, query, seed):
    data = numbered({"train": sizes, "val": [4] * 5, "test": [4] * 5}, rotations)
    task = data.episodes("train", Shape(way, shot, query), seed).draw(0, 6)
    for t in range(6):
        parts: dict[str, Any] = {"support": task.support, "query": task.query}
        seen = {
            name: [
                (y, turn, cls, image)
                for y, turn, (cls, image) in zip(
                    part.y[t].tolist(),
                    turns_of(part.x[t]).tolist(),
                    identity(upright(part.x[t])).tolist(),
                    strict=True,
                )
            ]
            for name, part in parts.items()
        }
        together = seen["support"] + seen["query"]
        assert len({entry[1:] for entry in together}) == way * (
            shot + query
        )  # no picture twice at all
        drawings = {name: {entry[2:] for entry in entries} for name, entries in seen.items()}
        assert not drawings["support"] & drawings["query"]  # not even turned
        assert all(image < sizes[cls] for _, _, cls, image in together)  # never the padding
        # A label stands for one class, the same in support and query, and each has its number of examples.
        classes: dict[int, tuple[int, int]] = {}
        for y, turn, cls, _ in together:
            assert classes.setdefault(y, (cls, turn)) == (cls, turn)
        assert len(set(classes.values())) == way
        assert torch.equal(task.support.y[t].bincount(minlength=way), torch.full((way,), shot))
        assert torch.equal(task.query.y[t].bincount(minlength=way), torch.full((way,), query))


@settings(max_examples=30, deadline=None)
@given(
    way=st.integers(2, 4), shot=st.integers(1, 2), query=st.integers(1, 2), unlabelled=st.integers(1, 3),
    distractors=st.integers(0, 3), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_unlabelled_examples_are_others_of_the_same_classes_and_of_distractors(
    way, shot, query, unlabelled, distractors, seed
):
    data = numbered({"train": [7] * 8, "val": [4] * 5, "test": [4] * 5})
    task = data.episodes("train", Shape(way, shot, query, unlabelled, distractors), seed).draw(0, 5)
    assert task.support.unlabelled is not None
    for t in range(5):
        labelled = [
            tuple(row)
            for part in (task.support, task.query)
            for row in identity(part.x[t]).tolist()
        ]
        more = [tuple(row) for row in identity(task.support.unlabelled[t]).tolist()]
        assert len({*labelled, *more}) == way * (shot + query) + (way + distractors) * unlabelled
        classes = [cls for cls, _ in more]
        assert {classes.count(cls) for cls in classes} == {unlabelled}
        assert {cls for cls, _ in labelled} <= set(classes)
        assert len(set(classes)) == way + distractors
    plain = data.episodes("train", Shape(way, shot, query), seed).draw(0, 5)
    if not distractors:  # the rest of the episode does not depend on them
        assert torch.equal(plain.query.x, task.query.x)


@pytest.mark.parametrize("share_drawings", [True, False])
def test_rotations_of_one_class_share_their_drawings_where_asked(share_drawings):
    data = numbered(
        {"train": [9] * 2, "val": [4] * 5, "test": [4] * 5}, "classes", True, share_drawings
    )
    task = data.episodes("train", Shape(5, 1, 1), 0).draw(0, 60)
    met, shared = 0, 0
    for x in task.support.x:
        drawings = [tuple(one) for one in identity(upright(x)).tolist()]
        for place, (cls, image) in enumerate(drawings):
            for other, other_image in drawings[place + 1 :]:
                met += cls == other
                shared += (cls, image) == (other, other_image)
    assert met > 100
    assert shared == met if share_drawings else shared < met / 4


def test_task_depends_on_its_number_alone():
    source = numbered({"train": [6] * 9, "val": [6] * 5, "test": [6] * 5}).episodes(
        "train", Shape(5, 1, 2), 7
    )
    together = source.draw(0, 8)
    apart = [source.draw(first, 2) for first in (0, 2, 4, 6)]
    assert torch.equal(together.query.x, torch.cat([part.query.x for part in apart]))
    assert torch.equal(together.key, torch.cat([part.key for part in apart]))
    assert together.key.unique().numel() == 8


def test_splits_draw_from_their_own_classes_and_streams():
    data = numbered({"train": [6] * 6, "val": [6] * 6, "test": [6] * 6})
    drawn = {
        split: data.episodes(split, Shape(5, 1, 2), 0).draw(0, 50)
        for split in ("train", "val", "test")
    }
    classes = {
        split: set(identity(task.query.x)[..., 0].flatten().tolist())
        for split, task in drawn.items()
    }
    assert classes == {"train": set(range(6)), "val": set(range(6, 12)), "test": set(range(12, 18))}
    assert not torch.equal(drawn["val"].query.y, drawn["test"].query.y)


def test_queries_come_in_no_class_order():
    task = (
        numbered({"train": [20] * 6, "val": [6] * 5, "test": [6] * 5})
        .episodes("train", Shape(5, 1, 10), 0)
        .draw(0, 40)
    )
    share = (task.query.y[:, :10] == 0).float().mean()
    assert 0.1 < share < 0.3


@pytest.mark.parametrize("rotations", ["train_classes", "classes", "episode", "none"])
def test_rotations(rotations):
    data = numbered({"train": [4] * 5, "val": [4] * 5, "test": [4] * 5}, rotations)
    for split in ("train", "test"):
        turned = rotations == "classes" or (rotations == "train_classes" and split == "train")
        assert data.num_classes(split) == (20 if turned else 5)
        task = data.episodes(split, Shape(5, 1, 2), 0).draw(0, 60)
        turns = turns_of(task.query.x)
        if not turned and rotations != "episode":
            assert not turns.any()
            continue
        assert set(turns.flatten().tolist()) == {0, 1, 2, 3}
        for t in range(
            60
        ):  # all examples of a class of an episode are turned alike, support and query
            for y in range(5):
                alike = torch.cat(
                    [
                        turns[t][task.query.y[t] == y],
                        turns_of(task.support.x[t])[task.support.y[t] == y],
                    ]
                )
                assert alike.unique().numel() == 1


@pytest.mark.parametrize("may_meet", [True, False])
def test_rotations_of_one_character_meet_only_where_allowed(may_meet):
    data = numbered({"train": [4] * 6, "val": [4] * 5, "test": [4] * 5}, "classes", may_meet)
    x = data.episodes("train", Shape(5, 1, 1), 0).draw(0, 100).support.x
    turned_back = torch.stack([upright(task) for task in x])
    met = [len(set(identity(task)[:, 0].tolist())) < 5 for task in turned_back]
    assert any(met) == may_meet


def test_batches_carry_global_labels():
    data = numbered({"train": [4, 7, 5], "val": [4] * 5, "test": [4] * 5}, "train_classes")
    batch = data.batches("train", 300, 0).draw(0, 2)
    assert batch.x.shape == (2, 300, 1, 2, 2)
    turns = turns_of(batch.x)
    pictures = identity(torch.stack([upright(row) for row in batch.x]))
    assert torch.equal(batch.y, pictures[..., 0] + 3 * turns)
    assert batch.y.unique().numel() == 12
    share = (pictures[..., 0] == 1).float().mean()
    assert abs(share - 7 / 16) < 0.1  # every image equally often, so larger classes more often


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (Shape(6, 1, 1), ["way=6", "5 classes"]),
        (Shape(5, 2, 3), ["2 + 3", "train1", "4 examples"]),
        (Shape(5, 1, 2, unlabelled=2), ["1 + 2 + 2", "train1", "4 examples"]),
        (Shape(4, 1, 1, unlabelled=1, distractors=2), ["4 + 2", "5 classes"]),
        (Shape(2, 1, 1, distractors=1), ["distractors=1", "episode.unlabelled"]),
    ],
)
def test_impossible_shapes_are_refused(shape, words):
    data = numbered({"train": [9, 4, 9, 9, 9], "val": [4] * 5, "test": [4] * 5})
    with pytest.raises(UserError) as caught:
        data.episodes("train", shape, 0)
    assert all(word in str(caught.value) for word in ["train", *words])


@pytest.mark.parametrize("rotations", ["none", "classes", "episode"])
def test_drawing_reads_no_value_on_the_host(rotations):
    """On torch's `meta` device a read, or a tensor on another device, is an error."""
    data = numbered({"train": [9] * 8, "val": [4] * 5, "test": [4] * 5}, rotations)
    meta = torch.device("meta")

    def moved(sampler):
        store, view = sampler.store, sampler.view
        index = dataclasses.replace(
            view.index, rows=view.index.rows.to(meta), counts=view.index.counts.to(meta)
        )
        index.__dict__["num_inputs"] = view.index.__dict__.get(
            "num_inputs"
        )  # if the sampler has read it
        parts = {name: getattr(store, name).to(meta) for name in ("images", "shift", "scale")}
        copied = copy.copy(sampler)
        for name, value in {
            "store": dataclasses.replace(store, **parts), "view": dataclasses.replace(view, index=index), "key": sampler.key.to(meta),
        }.items():  # fmt: skip
            object.__setattr__(copied, name, value)
        return copied

    number = torch.zeros((), dtype=torch.int64, device=meta)
    task = moved(data.episodes("train", Shape(5, 1, 2, unlabelled=2, distractors=1), 0)).draw(
        number, 4
    )
    assert task.query.x.shape == (4, 10, 1, 2, 2) and task.query.x.device == meta
    assert moved(data.batches("train", 16, 0)).draw(number, 3).y.device == meta
