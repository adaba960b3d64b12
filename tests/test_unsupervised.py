"""Training without labels: SimCLR, and training classes from clusters."""

import io
import math
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from sklearn.cluster import KMeans

from metalearn.algorithms.simclr import SimCLR, contrast
from metalearn.config import checking
from metalearn.run import clusters
from metalearn.run.build import build
from metalearn.run.evaluate import evaluate
from metalearn.run.train import train
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.types import Batch
from tests.one_task import COMMON, PROGRESS, init_state

_SILENT = Console(file=io.StringIO(), width=200)
_TINY = ["train.batch_size=16", "train.steps=2", "val.every=2", "episode.query=2"]
_LABELS = ["algo=protonet", *_TINY, "dataset.clusters=6"]


@pytest.fixture(scope="module")
def embedding(tmp_path_factory):
    return tmp_path_factory.mktemp("embedding") / "run"


@pytest.fixture
def clustered(compose, embedding):
    """Overrides of a run on clusters of the embeddings of a tiny SimCLR run."""
    if not embedding.exists():
        train(compose("algo=simclr", *_TINY), embedding, "simclr", [], _SILENT)
    return [*_LABELS, "dataset.labels=clusters", f"dataset.clusters_of={embedding}"]


def test_nt_xent_is_that_of_a_loop_over_pairs():
    z, temperature = torch.randn(8, 5, dtype=torch.float64, generator=_generator()), 0.3
    logits, other = contrast(z, temperature)

    def similarity(i: int, k: int) -> float:
        return float(z[i] @ z[k] / (z[i].norm() * z[k].norm())) / temperature

    losses = []
    for i in range(8):
        j = i + 1 if i % 2 == 0 else i - 1
        total = sum(math.exp(similarity(i, k)) for k in range(8) if k != i)
        losses.append(-math.log(math.exp(similarity(i, j)) / total))
    value = torch.nn.functional.cross_entropy(logits, other)
    assert float(value) == pytest.approx(sum(losses) / 8, rel=1e-12)


def test_simclr_contrasts_projections_of_the_embeddings():
    algorithm = SimCLR(**COMMON, source="batches", projection=3, contrast_temperature=0.3)
    state = init_state(algorithm, classes=9)
    x = torch.randn(8, 4, dtype=torch.float64, generator=_generator())
    batch = Batch(x, torch.arange(4).repeat_interleave(2), prng.key_of(1))
    p = state.params
    z = torch.tanh(x @ p["net.linear0.weight"].T + p["net.linear0.bias"])
    hidden = (z @ p["projection.weight0"].T + p["projection.bias0"]).clamp_min(0)
    logits, other = contrast(hidden @ p["projection.weight1"].T + p["projection.bias1"], 0.3)
    expected = torch.nn.functional.cross_entropy(logits, other)
    value = algorithm.batch_loss(state, batch, PROGRESS).value
    torch.testing.assert_close(value, expected)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_batches_have_two_different_views_of_each_image(make_run):
    run = make_run("algo=simclr", *_TINY)
    batch = run.train.draw(0, 1)
    assert batch.x.shape[1] == 32 and torch.equal(batch.y[0, ::2], batch.y[0, 1::2])
    assert ((batch.x[0, ::2] - batch.x[0, 1::2]).abs().amax((1, 2, 3)) > 0.1).all()
    plain = make_run("algo=simclr", *_TINY, "augment.ops.affine.degrees=0",
                     "augment.ops.affine.translate=0", "augment.ops.affine.scale=0",
                     "augment.ops.random_erasing.probability=0")  # fmt: skip
    x = plain.train.draw(0, 1).x[0]
    torch.testing.assert_close(x[::2], x[1::2], rtol=0, atol=1e-5)


def test_views_without_augmentation_are_refused(make_run):
    with pytest.raises(UserError, match=r"augment=none: SimCLR .* choose augment=views"):
        make_run("algo=simclr", "augment=none")


def test_groups_become_classes_of_one_partition_each_and_small_ones_are_left_out():
    rows = torch.tensor([3, 5, 8, 9, 20])
    groups = torch.tensor([[1, 0, 1, 2, 1], [0, 0, 1, 1, 1]])
    index = clusters.grouped(rows, groups, 2, torch.device("cpu"))
    found = [
        sorted(own[:count].tolist()) for own, count in zip(index.rows, index.counts, strict=True)
    ]
    assert found == [[3, 8, 20], [3, 5], [8, 9, 20]]
    assert index.parts[0] != index.parts[1] == index.parts[2]
    assert clusters.grouped(rows, groups[:1], 2, torch.device("cpu")).parts == ()
    other = clusters.grouped(rows, groups.flip(0), 2, torch.device("cpu"))
    assert not set(index.names) & set(other.names)
    assert clusters.grouped(rows, groups, 4, torch.device("cpu")).names == ()


def test_k_means_finds_separate_clusters_and_is_deterministic():
    centres = 20 * torch.randn(4, 6, generator=_generator())
    z = centres.repeat_interleave(10, 0) + torch.randn(40, 6, generator=_generator())
    key = prng.fold_in(prng.key_of(7), torch.arange(3))
    groups = clusters.k_means(z, key, 4)
    assert groups.shape == (3, 40)
    assert [len(own.unique()) for own in groups[0].view(4, 10)] == [1] * 4
    assert len(groups[0].unique()) == 4
    assert torch.equal(clusters.k_means(z, key, 4), groups)


def test_each_partition_after_the_first_scales_every_feature(monkeypatch):
    seen = []

    class Recorder(KMeans):
        def fit(self, x):
            seen.append(torch.from_numpy(x))
            return super().fit(x)

    monkeypatch.setattr("sklearn.cluster.KMeans", Recorder)
    z = torch.rand(30, 6, generator=_generator()) + 1
    clusters.k_means(z, prng.fold_in(prng.key_of(7), torch.arange(3)), 2)
    scales = [(x / z) for x in seen]
    assert torch.equal(seen[0], z) and not torch.allclose(scales[1], scales[2])
    for scale in scales[1:]:
        torch.testing.assert_close(scale, scale[:1].expand_as(scale))
        assert 0 <= scale.min() < scale.max() <= 1


def test_clusters_change_the_classes_of_training_alone(clustered, make_run):
    true, run = make_run("algo=protonet", *_TINY), make_run(*clustered)
    assert run.class_names["train"] != true.class_names["train"]
    sources = zip((true.val, true.test), (run.val, run.test), strict=True)
    for own, other in sources:
        first, second = own.draw(0, 3), other.draw(0, 3)
        assert torch.equal(first.query.x, second.query.x)
        assert torch.equal(first.query.y, second.query.y)
    assert run.protocol_id == true.protocol_id
    rows = run.train.view.index.rows
    assert set(rows.unique().tolist()) <= set(true.train.view.index.rows.unique().tolist())
    assert run.train.view.index.smallest[1] >= run.train.shape.examples
    assert len(run.notes) == 1 and "clusters (" in run.notes[0] and not true.notes


def test_clusters_depend_on_the_seed_and_are_cached(clustered, compose, tmp_path, monkeypatch):
    def names(*words: str) -> tuple[str, ...]:
        own = compose(*clustered, f"cache_dir={tmp_path}", *words)
        return build(checking.check_config(own)).class_names["train"]

    first = names()
    assert names("seed=1")[0] != first[0]
    monkeypatch.setattr(clusters, "k_means", None)
    assert names() == first
    with pytest.raises(TypeError):
        names("dataset.clusters=5")


def test_random_labels_are_balanced_and_partitions_differ(make_run):
    run = make_run(*_LABELS, "dataset.labels=random", "dataset.partitions=2")
    counts = run.train.view.index.counts
    assert len(counts) == 12 and counts.max() - counts.min() <= 1
    first, second = run.train.view.index.rows[0], run.train.view.index.rows[6]
    assert not torch.equal(first.sort().values, second.sort().values)
    assert len(set(run.train.view.index.parts)) == 2
    run.train.draw(0, 2)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["dataset.labels=clusters"], "set dataset.clusters_of"),
        (["dataset.clusters_of=runs/a"], "requires dataset.labels=clusters"),
        (["dataset.labels=random", "dataset.clusters=100000"], "should be at most 780"),
        (["dataset.labels=random", "dataset.clusters=400"], "no cluster has the 3 images"),
        (["dataset.labels=clusters", "dataset.clusters_of=runs/a"], "runs/a"),
    ],
)
def test_impossible_clusters_are_refused(words, line, make_run):
    with pytest.raises(UserError, match=line):
        make_run(*_LABELS, *words)


def test_embeddings_that_depend_on_other_images_are_refused(compose, make_run, tmp_path):
    train(compose("algo=maml", *_TINY), tmp_path / "maml", "maml", [], _SILENT)
    with pytest.raises(UserError, match=r"clusters_of=.*maml: .* depends on other images"):
        make_run(*_LABELS, "dataset.labels=clusters", f"dataset.clusters_of={tmp_path}/maml")


@pytest.mark.parametrize("algo", ["maml", "baseline"])
def test_run_on_clusters_is_tested_again_without_the_embedding_run(
    algo, clustered, embedding, compose, tmp_path
):
    copy = tmp_path / "embedding"
    shutil.copytree(embedding, copy)
    words = [*clustered, f"algo={algo}", f"dataset.clusters_of={copy}"]
    folder: Path = tmp_path / "run"
    train(compose(*words[1:]), folder, algo, [], _SILENT)
    shutil.rmtree(copy)
    evaluate(folder, ["episode.query=3"], "test", None, _SILENT)
    with pytest.raises(UserError, match=r"dataset\.labels"):
        evaluate(folder, ["dataset.labels=given"], "test", None, _SILENT)
