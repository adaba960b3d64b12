"""Augmentations against slow loops, and the splits they apply to."""

import dataclasses

import pytest
import torch

from metalearn.tasks import augment, prng
from metalearn.tasks.store import Augmented, ImageStore

_KEYS = prng.fold_in(prng.key_of(0), torch.arange(200))


def test_random_crop_is_a_window_of_the_padded_image():
    x = torch.rand(200, 2, 6, 5) + 0.1
    output = augment.random_crop(x, _KEYS, padding=2)
    padded = torch.nn.functional.pad(x, [2] * 4)
    corners = set()
    for image, padded_image in zip(output, padded, strict=True):
        matches = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if torch.equal(padded_image[:, top : top + 6, left : left + 5], image)
        ]
        assert len(matches) == 1
        corners.add(matches[0])
    assert len(corners) == 25


def test_horizontal_flip_mirrors_half_of_the_images():
    x = torch.rand(200, 1, 3, 4)
    output = augment.horizontal_flip(x, _KEYS)
    is_flipped = [torch.equal(image, old.flip(-1)) for image, old in zip(output, x, strict=True)]
    assert all(
        torch.equal(image, old)
        for image, old, flipped in zip(output, x, is_flipped, strict=True)
        if not flipped
    )
    assert 70 < sum(is_flipped) < 130


def test_augmentation_depends_on_the_key_and_not_on_the_rest_of_the_batch():
    x = torch.rand(200, 1, 8, 8)
    change = augment.chain(
        {"a": (augment.random_crop, {"padding": 3}), "b": (augment.horizontal_flip, {})}
    )
    assert torch.equal(change(x, _KEYS)[50:60], change(x[50:60], _KEYS[50:60]))


def test_store_augments_before_it_normalises():
    images = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    store = ImageStore(images, torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), 2.0))
    rows, key = torch.tensor([[0, 1, 2], [3, 4, 0]]), prng.fold_in(prng.key_of(1), torch.arange(2))
    unchanged = Augmented(store, lambda x, key: x)
    assert torch.equal(unchanged.gather(rows, key), store.gather(rows, key))
    black = Augmented(store, lambda x, key: torch.zeros_like(x))
    assert (black.gather(rows, key) == -1).all()
    cropped = Augmented(store, lambda x, key: augment.random_crop(x, key))
    assert torch.equal(cropped.gather(rows, key)[1:], cropped.gather(rows[1:], key[1:]))


@pytest.mark.slow
@pytest.mark.slow
def test_only_training_is_augmented(make_run):
    overrides = ["algo=protonet", "dataset.image_size=12", "backbone.blocks=2"]
    plain, changed = make_run(*overrides), make_run(*overrides, "augment=crop_flip")
    first, second = plain.train.draw(0, 2), changed.train.draw(0, 2)
    assert torch.equal(first.query.y, second.query.y) and not torch.equal(
        first.query.x, second.query.x
    )
    assert torch.equal(second.query.x, changed.train.draw(0, 2).query.x)
    for name in ("val", "test"):
        assert torch.equal(
            getattr(plain, name).draw(0, 2).query.x, getattr(changed, name).draw(0, 2).query.x
        )
    assert plain.protocol == changed.protocol
    batches = make_run("algo=rfs", "augment=crop_flip", "train.batch_size=6")
    assert batches.train.draw(0, 2).x.shape == (2, 6, 1, 16, 16)


def test_settings_of_an_augmentation_are_its_arguments(make_run):
    run = make_run("algo=protonet", "augment=crop_flip", "augment.ops.random_crop.padding=0")
    store = run.train.store
    assert isinstance(store, Augmented)
    unchanged = dataclasses.replace(
        store, augment=augment.chain({"a": (augment.random_crop, {"padding": 0})})
    )
    rows = torch.arange(4)[None]
    assert torch.equal(unchanged.gather(rows, _KEYS[:1]), store.store.gather(rows, _KEYS[:1]))
