"""Each input is embedded once, with the scores of embedding it in every episode."""

import contextlib
import dataclasses
import os
import signal
import sqlite3
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from metalearn.backbones.conv4 import Conv4
from metalearn.backbones.pretrained import Timm
from metalearn.config import checking, components, composition
from metalearn.predict.embedder import Embedder
from metalearn.report.progress import SILENT, Listener
from metalearn.run import features, loop, scoring
from metalearn.run.build import build
from metalearn.run.feature_cache import BATCH
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.types import InputSpec
from tests import command
from tests.fixtures import ALGORITHMS
from tests.test_contract import STABLE
from tests.test_pretrained import GLYPHS, TINY

pytestmark = pytest.mark.slow

_POPULATION = ["statistics=population", "test.episodes=6", "val.episodes=4"]
#: Methods whose embedding never changes with the task.
_HEADS = (
    "baseline", "baseline_pp", "bd_cspn", "calibration", "feat", "frn", "hallucinate",
    "in_context", "laplacian_shot", "mapping", "matching", "meta_baseline", "metanet",
    "metaopt_svm", "protonet",
    "pt_map", "r2d2", "relation", "rfs", "siamese", "simclr",
    "simple_shot", "snail", "soft_kmeans", "tim",
    "transductive_finetune",
)  # fmt: skip
_QUICK = ("protonet", "rfs", "maml")


def methods(names):
    return [pytest.param(n, marks=() if n in _QUICK else pytest.mark.slow) for n in names]


@pytest.fixture
def run_of(tmp_path, compose):
    """Build two runs: with features, and without."""

    def make(*overrides, network=()):
        words = [*GLYPHS, *TINY, f"cache_dir={tmp_path}"] if network else []
        composer = composition.compose_config if network else lambda words: compose(*words)
        return [
            build(
                checking.check_config(
                    composer([*words, *network, *overrides, f"engine.features={is_used}"])
                )
            )
            for is_used in ("true", "false")
        ]

    return make


class Counting(Listener):
    def __init__(self):
        self.inputs = []
        self.lines = []

    def embedding(self, done, total):
        self.inputs.append((done, total))

    def note(self, line):
        self.lines.append(line)


def check_same_scores(run, other):
    counting, nothing = Counting(), Counting()
    tested = scoring.test(run, run.state, None, counting)
    expected = scoring.test(other, other.state, None, nothing)
    torch.testing.assert_close(tested.confidence, expected.confidence, rtol=1e-4, atol=1e-5)
    # An accuracy may differ only where two classes are equally probable, up to rounding.
    torch.testing.assert_close(tested.scores, expected.scores, rtol=0, atol=1 / 15 + 1e-6)
    torch.testing.assert_close(tested.classes, expected.classes, rtol=0, atol=0)
    assert not nothing.inputs
    val = [scoring.evaluate(one, one.state, one.val, 4) for one in (run, other)]
    torch.testing.assert_close(*val, rtol=0, atol=1 / 15 + 1e-6)
    return counting


@pytest.mark.parametrize("algo", methods(ALGORITHMS))
def test_scores_equal_those_without_features(algo, run_of):
    counting = check_same_scores(*run_of(f"algo={algo}", *_POPULATION, *STABLE.get(algo, [])))
    assert bool(counting.inputs) is (algo in _HEADS)


# CAVIA modulates normalisations, which this network does not offer.
@pytest.mark.parametrize("algo", methods([name for name in ALGORITHMS if name != "cavia"]))
def test_scores_of_a_frozen_network_equal_those_without_features(algo, run_of):
    counting = check_same_scores(*run_of("train.steps=0", network=[f"algo={algo}"]))
    # MAML++ has other weights in each step, LoRA other weights of the network in each task.
    assert counting.inputs or algo in ("maml_pp", "lora")


@pytest.mark.parametrize("statistics", ["query", "support"])
def test_embeddings_that_depend_on_others_are_not_reused(statistics, run_of):
    run, _ = run_of("algo=protonet", f"statistics={statistics}")
    assert not features.embeds_alone(run.algorithm)
    plain = run_of("algo=anil", "backbone.normalisation=none")[0].algorithm
    assert features.embeds_alone(plain)
    assert not features.embeds_alone(
        run_of("algo=maml", "backbone.normalisation=none")[0].algorithm
    )

    class Peeking(type(run.algorithm)):  # type: ignore[misc]
        def adapt(self, state, support, *, key, steps=None):
            return super().adapt(state, support, key=key)

    fields = {f.name: getattr(run.algorithm, f.name) for f in dataclasses.fields(run.algorithm)}
    assert features.embeds_alone(type(run.algorithm)(**fields | {"statistics": "population"}))
    assert not features.embeds_alone(Peeking(**fields | {"statistics": "population"}))


@pytest.mark.parametrize(
    "rotations", ["none", pytest.param("classes", marks=pytest.mark.slow), "episode"]
)
def test_each_input_is_embedded_once(rotations, run_of, monkeypatch):
    words = ["algo=protonet", *_POPULATION, f"dataset.rotations={rotations}"]
    run, other = run_of(*words, "test.episodes=40")
    counting = check_same_scores(run, other)
    done, total = counting.inputs[-1]
    drawn = 40 * (5 * 1 + 5 * 3)
    assert done == total < drawn
    seen = []
    forward = Conv4.forward

    def counted(self, params, x, norm, key):
        seen.append(len(x))
        return forward(self, params, x, norm, key)

    monkeypatch.setattr(Conv4, "forward", counted)
    scoring.test(run, run.state, None)
    assert set(seen) == {BATCH} and total <= sum(seen) < total + features.BATCH


def test_unlabelled_examples_are_embedded_as_well(run_of):
    check_same_scores(*run_of("algo=protonet", *_POPULATION, "episode.unlabelled=2"))


@pytest.mark.parametrize("algo", ["rfs", "anil", pytest.param("reptile", marks=pytest.mark.slow)])
def test_training_on_features_of_a_frozen_network_is_the_same(algo, run_of, tmp_path):
    steps = 40 if algo == "rfs" else 10  # a batch has fewer inputs than a task
    words = [f"algo={algo}", "backbone.frozen=true", f"train.steps={steps}"]
    words += [f"val.every={steps // 2}", "dataset.drawings=8"]
    words += ["train.batch_size=16", "episode.query=2"]
    fitted: list[Any] = []
    for run in run_of(*words, network=["train.meta_batch=4"]):
        counting = Counting()
        folder = tmp_path / str(len(fitted))
        folder.mkdir()
        fitted.append(loop.fit(run, counting, folder))
        assert bool(counting.inputs) is run.config.engine.features
    for name, value in fitted[1].state.params.items():
        torch.testing.assert_close(fitted[0].state.params[name], value, rtol=1e-3, atol=1e-5)


def test_augmentation_is_not_embedded_once(run_of):
    words = ["algo=rfs", "train.steps=1000", "augment=crop_flip"]
    run, _ = run_of(*words, network=["backbone.frozen=true"])
    assert features.for_training(run, run.state, SILENT) is run


def test_too_many_features_are_not_stored(run_of, monkeypatch):
    monkeypatch.setattr(features, "_MAX_BYTES", 1000)
    run, other = run_of("algo=protonet", *_POPULATION)
    counting = check_same_scores(run, other)
    assert not counting.inputs and "too much" in counting.lines[0]


@pytest.fixture
def files(tmp_path):
    """Write images of many kinds, one of them unreadable at index 3."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 4), dtype=np.uint8)
    images = {
        "a.png": Image.fromarray(pixels[..., :3]),
        "b.jpg": Image.fromarray(pixels[..., 0]),
        "c.png": Image.fromarray(pixels),
        "e.png": Image.fromarray(pixels[..., 0].astype(np.uint16) * 256),
        "f.gif": Image.fromarray(pixels[:9, :, 1]),
    }
    for name, image in images.items():
        image.save(tmp_path / name)
    (tmp_path / "d.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    return sorted(tmp_path.iterdir())


def embed(images, cache_dir, **options):
    node = checking.check_config(composition.compose_config(TINY)).backbone
    node = node | {"weights": options.pop("weights", None)}
    embedder = Embedder(node, torch.device("cpu"), cache_dir, options.pop("progress", None))
    return torch.from_numpy(embedder.represent(images, **options))


def test_images_are_embedded_by_their_content(files, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    unreadable: dict[int, str] = {}
    progress: list[tuple[int, int]] = []
    z = embed(files, cache, unreadable=unreadable, progress=lambda *n: progress.append(n))
    assert z.shape == (6, 96) and z.dtype == torch.float32
    assert list(unreadable) == [3] and z[3].isnan().all() and not z[[0, 1, 2, 4, 5]].isnan().any()
    with pytest.raises(UserError, match=r"d\.png is not a readable image"):
        embed(files, cache)
    with pytest.raises(UserError, match=r"x\.png is not a readable image"):
        embed([tmp_path / "x.png"], cache)
    opened = [Image.open(files[0]), files[0], str(files[1])]
    torch.testing.assert_close(embed(opened, tmp_path / "other"), z[[0, 0, 1]])
    network = components.make(composition.compose_config(TINY).backbone, "backbone")
    params, population = network.init(InputSpec((3, 32, 32)), prng.key_of(0))
    own = network.preprocessing.crop(Image.open(files[0]))
    x = torch.from_numpy(np.asarray(own).copy()).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(network.embed(params, x, population)[0], z[:1])

    def never(*_):
        raise AssertionError("not cached")

    (tmp_path / "moved.png").write_bytes(files[0].read_bytes())
    monkeypatch.setattr(Timm, "forward", never)
    assert torch.equal(embed([files[1], tmp_path / "moved.png"], cache), z[[1, 0]])
    with pytest.raises(AssertionError, match="not cached"):
        embed(
            [files[1].with_name("e.png").rename(tmp_path / "g.png"), Image.new("L", (9, 9))], cache
        )


def test_no_images_and_other_networks(tmp_path):
    assert embed([], tmp_path).shape == (0, 96)
    settings = checking.check_config(composition.compose_config(["backbone=conv4"])).backbone
    with pytest.raises(UserError, match="should be a pretrained network"):
        Embedder(settings, torch.device("cpu"), tmp_path)


def test_corrupt_cache_is_rebuilt_and_unusable_folder_is_reported(files, tmp_path, capsys):
    cache = tmp_path / "cache"
    z = embed(files[:2], cache)
    (file,) = cache.glob("features-*.sqlite")
    file.write_bytes(b"no database" * 100)
    assert torch.equal(embed(files[:2], cache), z)
    assert "is corrupt; rebuilding it" in capsys.readouterr().err
    with pytest.raises(UserError, match="choose another folder"):
        embed(files[:2], files[0])


def _killed(images, cache):
    """Embed images, and kill this process after the second batch."""
    torch.set_num_threads(1)

    def progress(done, total):
        if done >= 2 * BATCH:
            os.kill(os.getpid(), signal.SIGKILL)

    embed(images, cache, progress=progress)


@pytest.mark.slow
def test_killed_process_leaves_an_intact_cache(tmp_path):
    images = [Image.new("RGB", (8, 8), (number, 7, 9)) for number in range(100)]
    process = command.CONTEXT.Process(target=_killed, args=(images, tmp_path / "cache"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (file,) = (tmp_path / "cache").glob("*.sqlite")
    with contextlib.closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        stored = connection.execute("SELECT COUNT(*) FROM features").fetchone()[0]
    assert stored == 2 * BATCH
    done = []
    z = embed(images, tmp_path / "cache", progress=lambda *counts: done.append(counts))
    assert [count for count, _ in done] == [96, 100]
    torch.testing.assert_close(z, embed(images, tmp_path / "fresh"))
