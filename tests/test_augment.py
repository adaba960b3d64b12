"""Augmentations: contracts of all of them, closed forms of each, and the splits they apply to."""

import inspect
import io
import math
from typing import Any

import pytest
import torch
import torchvision.transforms.functional as TF
from rich.console import Console

import metalearn
from metalearn.config import checking, composition
from metalearn.run.build import build
from metalearn.run.pairings import check
from metalearn.run.step import Training
from metalearn.run.train import train
from metalearn.system.errors import UserError
from metalearn.tasks import augment, mixing, prng
from metalearn.tasks.augment import AUGMENTATIONS, input_kinds
from metalearn.tasks.mixing import MIXINGS
from metalearn.tasks.store import Augmented, ImageStore
from tests.fixtures import ALGORITHMS

_KEYS = prng.fold_in(prng.key_of(0), torch.arange(200))
#: These round differently in batches of different sizes or on other devices.
_ROUNDS = {"colour_jitter", "affine", "gaussian_noise"}


def _inputs(function, count=200):
    kind = input_kinds(function)[0]
    if kind == "tokens":
        return prng.integers(_KEYS[:count], (12,), 50) + 1
    return prng.uniform(_KEYS[:count], (7,) if kind == "features" else (3, 12, 10))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_is_a_function_of_input_and_key(name):
    function = AUGMENTATIONS[name]
    x, tolerance = _inputs(function), 1e-5 if name in _ROUNDS else 0
    before = x.clone()
    changed = function(x, _KEYS)
    assert torch.equal(x, before)
    assert (changed.shape, changed.dtype, changed.requires_grad) == (x.shape, x.dtype, False)
    assert torch.equal(function(x, _KEYS), changed)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:31]
    torch.testing.assert_close(
        function(x[order], _KEYS[order]), changed[order], rtol=0, atol=tolerance
    )
    assert not torch.equal(function(x, prng.fold_in(_KEYS, 1)), changed)
    same = function(x[:1].expand_as(x), _KEYS)  # each key changes an input in its own way
    assert len(same.unique(dim=0)) > 8 or name == "horizontal_flip"
    if input_kinds(function) == ("images",):
        assert changed.min() >= 0 and changed.max() <= 1
    on_meta = function(x.to("meta"), _KEYS.to("meta"))  # reads no value on the host
    assert (on_meta.shape, on_meta.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("name", MIXINGS)
def test_mixing_is_a_function_of_batch_and_key(name):
    function, x = MIXINGS[name], _inputs(MIXINGS[name], 60)
    y = torch.eye(6).repeat(10, 1)
    mixed, labels = function(x, y, _KEYS[0])
    assert torch.equal(function(x, y, _KEYS[0])[0], mixed)
    assert not torch.equal(function(x, y, _KEYS[1])[0], mixed)
    assert (mixed.shape, mixed.dtype, labels.shape) == (x.shape, x.dtype, y.shape)
    torch.testing.assert_close(labels.sum(-1), torch.ones(60))
    assert labels.min() >= 0 and mixed.min() >= 0 and mixed.max() <= 1
    on_meta = function(x.to("meta"), y.to("meta"), _KEYS[0].to("meta"))
    assert (on_meta[0].shape, on_meta[1].shape) == (x.shape, y.shape)


@pytest.mark.parametrize("function", [*AUGMENTATIONS.values(), *MIXINGS.values()])
def test_a_change_of_inputs_is_short(function):
    assert len(inspect.getsource(function).splitlines()) <= 15


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


def test_colour_jitter_equals_torchvision_with_the_same_factors():
    x = _inputs(augment.colour_jitter, 20)
    output = augment.colour_jitter(x, _KEYS[:20], 0.4, 0.3, 0.2)
    for image, key, actual in zip(x, _KEYS, output, strict=False):
        bright, contrast, saturated = (2 * prng.uniform(key, (3,)) - 1).tolist()
        image = TF.adjust_brightness(image, 1 + 0.4 * bright)
        image = TF.adjust_contrast(image, 1 + 0.3 * contrast)
        image = TF.adjust_saturation(image, 1 + 0.2 * saturated)
        torch.testing.assert_close(actual, image, rtol=0, atol=2e-4)  # its luma has fewer digits
    grey = x[:, :1]  # has no saturation
    torch.testing.assert_close(augment.colour_jitter(grey, _KEYS[:20], 0, 0, 0.4), grey)


def test_affine_reads_each_pixel_where_the_map_says():
    x, settings = _inputs(augment.affine, 8), (30.0, 0.2, 0.3)
    output = augment.affine(x, _KEYS[:8], *settings)
    degrees, translate, scale = settings
    height, width = x.shape[-2:]
    for image, key, actual in zip(x, _KEYS, output, strict=False):
        turn, zoom, right, down = (2 * prng.uniform(key, (4,)).double() - 1).tolist()
        angle, zoom = math.radians(degrees) * turn, 1 + scale * zoom
        for row in range(height):
            for column in range(width):
                y, x_ = row - (height - 1) / 2, column - (width - 1) / 2
                source_x = (x_ * math.cos(angle) - y * math.sin(angle)) / zoom
                source_y = (x_ * math.sin(angle) + y * math.cos(angle)) / zoom
                at = (
                    source_y + translate * down * height + (height - 1) / 2,
                    source_x + translate * right * width + (width - 1) / 2,
                )
                expected = torch.zeros(3)
                for i in (math.floor(at[0]), math.floor(at[0]) + 1):
                    for j in (math.floor(at[1]), math.floor(at[1]) + 1):
                        if 0 <= i < height and 0 <= j < width:
                            expected += (1 - abs(at[0] - i)) * (1 - abs(at[1] - j)) * image[:, i, j]
                torch.testing.assert_close(actual[:, row, column], expected, rtol=0, atol=1e-5)


def test_cutout_and_random_erasing_fill_one_box():
    x = torch.full((200, 1, 20, 16), 0.25)
    cut = augment.cutout(x, _KEYS, size=6, value=1.0) == 1
    erased = augment.random_erasing(x, _KEYS, probability=0.7, area=(0.1, 0.2), value=1.0) == 1
    sizes = []
    for mask in (*cut[:, 0], *erased[:, 0]):
        rows, columns = mask.any(1).sum(), mask.any(0).sum()
        assert mask.sum() == rows * columns  # a full box
        sizes.append((int(rows), int(columns)))
    assert max(sizes[:200]) == (6, 6) and min(sizes[:200])[0] >= 3  # clipped at the border
    areas = torch.tensor([rows * columns for rows, columns in sizes[200:] if rows]) / 320
    assert 110 < len(areas) < 170 and areas.min() > 0.07 and areas.max() < 0.24
    assert abs(areas.mean() - 0.15) < 0.01
    for share in (
        0.01,
        0.5,
        0.9,
        1.0,
    ):  # most boxes would be larger than the image in one direction
        covered = augment.random_erasing(x, _KEYS, probability=1.0, area=(share, share)) != x
        assert (covered.flatten(1).float().mean(1) - share).abs().max() < 0.04


def test_mixup_shares_follow_their_distribution_and_mix_inputs_as_labels():
    for alpha in (0.05, 0.2, 1.0):
        shares = mixing.beta(prng.key_of(1), 20_000, alpha)
        variance = 1 / (4 * (2 * alpha + 1))
        assert abs(shares.mean() - 0.5) < 0.01 and abs(shares.var() / variance - 1) < 0.03
    y = torch.eye(50)
    x, labels = mixing.mixup(y, y, _KEYS[0], alpha=1.0)
    torch.testing.assert_close(x, labels)
    assert ((labels > 0).sum(-1) <= 2).all() and len(labels.amax(-1).unique()) > 40


def test_cutmix_pastes_as_much_as_the_labels_say():
    count = 50
    x = torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 3, 9, 7)
    mixed, labels = mixing.cutmix(x, torch.eye(count), _KEYS[0], probability=0.8)
    one_hot = torch.nn.functional.one_hot(mixed[:, 0].long(), count).float()
    torch.testing.assert_close(one_hot.mean((1, 2)), labels)
    is_mixed = (labels > 0).sum(-1) == 2
    assert 25 < is_mixed.sum() < 48 and torch.equal(mixed[:, 0], mixed[:, 2])


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
def test_only_training_is_augmented(make_run):
    overrides = ["algo=protonet", "dataset.image_size=12", "backbone.blocks=2"]
    plain, changed = make_run(*overrides), make_run(*overrides, "augment=crop_flip")
    first, second = plain.train.draw(0, 2), changed.train.draw(0, 2)
    assert torch.equal(first.query.y, second.query.y) and not torch.equal(
        first.query.x, second.query.x
    )
    assert torch.equal(second.query.x, changed.train.draw(0, 2).query.x)
    mixed = make_run(*overrides, "+augment.mix.mixup={}")
    for name in ("val", "test"):
        for run in (changed, mixed):
            assert torch.equal(
                getattr(plain, name).draw(0, 2).query.x, getattr(run, name).draw(0, 2).query.x
            )
    assert plain.protocol == changed.protocol == mixed.protocol
    batches = make_run("algo=rfs", "augment=crop_flip", "train.batch_size=6")
    assert batches.train.draw(0, 2).x.shape == (2, 6, 1, 16, 16)


def test_queries_are_mixed_within_their_task_and_batches_over_all_classes(make_run):
    mix = "+augment.mix={mixup:{alpha:1},cutmix:{}}"
    plain, mixed = make_run("algo=protonet"), make_run("algo=protonet", mix)
    before: Any = plain.train.draw(3, 4)
    after: Any = mixed.train.draw(3, 4)
    assert torch.equal(before.support.x, after.support.x)
    assert torch.equal(before.support.y, after.support.y)
    assert after.query.y.shape == (4, 15, 5) and not torch.equal(before.query.x, after.query.x)
    one: Any = mixed.train.draw(5, 1)  # a task does not depend on those drawn with it
    torch.testing.assert_close(one.query.x, after.query.x[2:3])
    step = mixed.train_engine.step(mixed.state, after, torch.zeros(()))
    assert step.losses.isfinite().all() and 0 < step.logs["accuracy"] < 1
    run = make_run("algo=rfs", mix, "train.batch_size=6")
    batch: Any = run.train.draw(0, 2)
    assert (
        batch.y.shape == (2, 6, run.spec.train_classes) and (batch.y.sum(-1) - 1).abs().max() < 1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_method_mixes_queries_or_says_that_it_cannot(name, make_run):
    words = [f"algo={name}", "+augment.mix.mixup={}", "train.meta_batch=2", "train.batch_size=6"]
    if name in ("feat", "reptile", "relation", "siamese", "simclr"):
        with pytest.raises(UserError, match=r"augment\.mix: .* cannot use; leave it out"):
            make_run(*words)
        return
    training = Training(make_run(*words))
    training.meta_step()
    assert int(training.meter.skipped()[0]) == 0


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["algo=reptile", "+augment.mix.mixup={}"], "Reptile's loss cannot use; leave it out"),
        (["algo=protonet", "+augment.mix.mixxup={}"], "did you mean mixup"),
        (["algo=protonet", "+augment.mix.mixup.alpha=2"], r"mixup\.alpha=2.0: should be at most 1"),
        (["algo=protonet", "+augment.ops.cutout.size=0"], r"cutout\.size=0: should be at least 1"),
        (
            ["algo=protonet", "+augment.ops.random_erasing.area=[0.1,2]"],
            r"random_erasing\.area=\[0.1, 2\]: should be at most 1",
        ),
        (["algo=rfs", "algo.support_copies=5"], "augment.support has no augmentation"),
        (
            ["algo=maml", "dataset=sinusoid", "+augment.ops.gaussian_noise={}"],
            r"changes inputs of classes, but this dataset has values \(regression\)",
        ),
    ],
)
def test_invalid_changes_of_inputs_are_refused(overrides, line, compose):
    if "dataset=sinusoid" in overrides:
        config = composition.compose_config(overrides)
    else:
        config = compose(*overrides)
    with pytest.raises(UserError, match=line):
        check(checking.check_config(config))


def test_augmentations_are_for_the_kinds_of_input_that_they_declare():
    def features(*overrides):
        words = ["algo=protonet", "dataset=gaussians", "backbone=mlp", "statistics=query"]
        return build(checking.check_config(composition.compose_config([*words, *overrides])))

    with pytest.raises(UserError, match="has features; use augment=none or one of: gaussian_noise"):
        features("augment=crop_flip")
    with pytest.raises(UserError, match=r"augment\.mix\.cutmix: changes images.* one of: mixup"):
        features("+augment.mix.cutmix={}")
    plain, noisy = features(), features("+augment.ops.gaussian_noise.std=2")
    difference = noisy.train.draw(0, 20).query.x - plain.train.draw(0, 20).query.x
    assert abs(difference.std() - 2) < 0.1
    assert features("+augment.mix.mixup={}").train.draw(0, 1).query.y.dim() == 3


def test_settings_of_an_augmentation_are_its_arguments(make_run):
    run = make_run("algo=protonet", "augment=crop_flip", "augment.ops.random_crop.padding=0")
    store = run.train.store
    assert isinstance(store, Augmented)
    rows = torch.arange(4)[None]
    expected = augment.horizontal_flip(
        store.store.load(rows)[0], prng.fold_in(prng.fold_in(_KEYS[:1], torch.arange(4)), 1)
    )
    assert torch.equal(store.gather(rows, _KEYS[:1])[0], store.normalise(expected))


def test_an_augmentation_can_have_a_name_of_its_own(make_run):
    twice = "+augment.ops={a:{_target_:random_crop,padding:9},b:{_target_:random_crop,padding:9}}"
    run = make_run("algo=protonet", twice, "augment.ops.a.padding=0", "augment.ops.b.padding=0")
    plain = make_run("algo=protonet")
    assert torch.equal(run.train.draw(0, 1).query.x, plain.train.draw(0, 1).query.x)
    with pytest.raises(UserError, match=r"augment\.ops\.a\._target_=crop: there is no such name"):
        make_run("algo=protonet", "+augment.ops={a:{_target_:crop}}")


@pytest.mark.slow
def test_trained_run_adapts_to_augmented_copies(compose, tmp_path):
    words = ["algo=rfs", "augment=crop_flip", "train.batch_size=6", "algo.support_copies=4"]
    words += ["augment.support.random_crop.padding=0", "~augment.support.horizontal_flip"]
    train(compose(*words), tmp_path / "run", "a run", words, Console(file=io.StringIO()))
    x = torch.rand(15, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    model = metalearn.load(tmp_path / "run")
    probabilities = model.adapt(x[:5], list("abcde")).probabilities(x)
    assert "augmented copies" in str(model.why_not_alone)  # so it is not exported
    config = tmp_path / "run/config.yaml"  # four equal copies are the example with 4 times the cost
    text = config.read_text().replace("support_copies: 4", "support_copies: 0")
    config.write_text(text.replace("cost: 1.0", "cost: 4.0"))
    plain = metalearn.load(tmp_path / "run").adapt(x[:5], list("abcde"))
    torch.testing.assert_close(plain.probabilities(x), probabilities)


def test_rfs_can_learn_from_augmented_copies_of_the_support_set(make_run):
    words = ["algo=rfs", "augment=crop_flip", "train.batch_size=6"]
    plain = make_run(*words)
    copied = make_run(*words, "algo.support_copies=3", "augment.support.random_crop.padding=2")
    before, after = plain.test.draw(4, 2), copied.test.draw(4, 2)
    assert torch.equal(before.query.x, after.query.x)
    assert after.support.x.shape == (2, 15, 1, 16, 16)
    assert after.support.y[0].bincount().tolist() == [3] * 5
    assert plain.protocol_id != copied.protocol_id
    assert copied.protocol["support_copies"] == 3
    assert torch.equal(copied.test.draw(5, 1).support.x, after.support.x[1:])
    assert len(copied.val.draw(0, 1).support.y[0]) == 15
    unchanged = make_run(
        *words,
        "algo.support_copies=3",
        "augment.support.random_crop.padding=0",
        "~augment.support.horizontal_flip",
    )
    drawn = unchanged.test.draw(4, 2)
    for task in range(2):  # three times the same example of each class
        for label in range(5):
            copies = drawn.support.x[task][drawn.support.y[task] == label]
            example = before.support.x[task][before.support.y[task] == label]
            assert torch.equal(copies, example.expand_as(copies))
