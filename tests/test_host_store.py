"""Images on the host give the same run, bit for bit, as images on the device."""

import dataclasses

import pytest
import torch
from rich.console import Console
from same_run import difference, left
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from metalearn.data.images import is_too_large
from metalearn.report.progress import SILENT
from metalearn.run import loop, scoring, train
from metalearn.run.feed import Feed
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.augment import AUGMENTATIONS, chain
from metalearn.tasks.mixing import MIXINGS, Mixed, one_of
from metalearn.tasks.sampling import BatchSampler, BatchSource, EpisodeSampler, Shape
from metalearn.tasks.store import Augmented, ClassIndex, ClassView, ImageStore, RotatedEpisodes

_CASES = {
    "episodes": ["algo=protonet"],
    "inner steps": ["algo=maml", "train.meta_batch=3"],
    "batches": ["algo=baseline", "train.batch_size=8", "augment=cifar"],
}


@pytest.mark.parametrize("case", _CASES)
def test_runs_on_host_and_device_are_the_same(case, make_run, tmp_path):
    outcomes = []
    for store in ("device", "host"):
        words = ["train.steps=4", *_CASES[case], f"dataset.store={store}"]
        run = make_run(*words)
        assert run.draws_on_host == (store == "host")
        fitted = loop.fit(run, SILENT, tmp_path)
        outcomes.append((fitted.state, scoring.test(run, fitted.state, None).scores))
    for one, other in zip(*map(pytree.tree_leaves, outcomes), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_a_run_on_the_host_is_resumed_on_the_device_and_back(compose, tmp_path, monkeypatch):
    def run(name, *more):
        words = ["algo=protonet", "train.steps=6", "checkpoint.every=2", "train.meta_batch=2"]
        config = compose(*words, *more, "resume=auto")
        train.train(config, tmp_path / name, "a run", [], Console(quiet=True))

    class Killed(BaseException):
        pass

    def kill(feed, first):
        if first == 2 * 5:  # the tasks of the sixth step
            raise Killed
        return prefetch(feed, first)

    run("whole", "dataset.store=device")
    prefetch = Feed.prefetch
    with monkeypatch.context() as patch:
        patch.setattr(Feed, "prefetch", kill)
        with pytest.raises(Killed):
            run("parts", "dataset.store=host")
    run("parts", "dataset.store=device")
    assert difference(left(tmp_path / "whole"), left(tmp_path / "parts")) is None
    with monkeypatch.context() as patch:
        patch.setattr(Feed, "prefetch", kill)
        with pytest.raises(Killed):
            run("again", "dataset.store=host")
    run("again", "dataset.store=host")
    assert difference(left(tmp_path / "whole"), left(tmp_path / "again")) is None


def test_episodes_of_varying_shapes_are_the_same_and_hard_classes_are_refused(make_run, tmp_path):
    words = ["algo=protonet", "episode.train.way=[2,5]", "train.steps=4"]
    states = [
        loop.fit(make_run(*words, f"dataset.store={store}"), SILENT, tmp_path).state
        for store in ("device", "host")
    ]
    for one, other in zip(*map(pytree.tree_leaves, states), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UserError, match=r"sampler=hard: .* use dataset\.store=device"):
        make_run("algo=protonet", "episode.train.sampler=hard", "dataset.store=host")


class Recorder(TorchDispatchMode):
    """Records operations; `replay` computes them again with the same tensors, as a graph would."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, output))
        return output

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, output in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(pytree.tree_leaves(output), pytree.tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Emulated:
    """Takes a plain step, then records one, then replays it."""

    def __init__(self, step, *_):
        self.step, self.calls, self.recorder = step, 0, Recorder()

    def __call__(self):
        self.step.__self__.reads_host = False
        self.calls += 1
        if self.calls == 1:
            self.step()
        elif self.calls == 2:
            with self.recorder:
                self.step()
        else:
            self.recorder.replay()


def test_a_captured_step_reads_the_tasks_of_each_step(make_run, tmp_path, monkeypatch):
    def fitted(*overrides):
        # A task per step, at a rate at which the weights depend on it.
        words = ["algo=protonet", "train.steps=6", "optimiser=sgd", "train.lr=0.1"]
        run = make_run(*words, *overrides)
        params = loop.fit(run, SILENT, tmp_path).state.params
        return torch.cat([value.flatten() for value in params.values()])

    plain = fitted()
    monkeypatch.setattr(loop, "Captured", Emulated)
    assert torch.equal(fitted("dataset.store=host"), plain)

    def load_elsewhere(feed, first):
        feed.tasks = feed._source.draw(first, feed._count)

    monkeypatch.setattr(Feed, "load", load_elsewhere)  # the step would not see these
    assert not torch.equal(fitted("dataset.store=host"), plain)


@pytest.mark.parametrize("view", [ClassView, RotatedEpisodes])
def test_all_that_is_drawn_on_the_host_is_on_the_device(view):
    rows = torch.arange(40).view(4, 10)
    index = ClassIndex(rows, torch.full((4,), 10), ("a", "b", "c", "d"))
    images = torch.zeros(40, 3, 8, 8, dtype=torch.uint8)
    device = torch.zeros(3, 1, 1, device="meta")
    store = ImageStore(images, device, device, has_rotations=view is RotatedEpisodes)
    crop = chain({"random_crop": (AUGMENTATIONS["random_crop"], {"padding": 2})})
    augmented, key = Augmented(store, crop), prng.key_of(0)
    episodes = EpisodeSampler(augmented, view(index), Shape(3, 1, 2, 1), key)
    copies = dataclasses.replace(episodes, store=store, support_store=augmented)
    batches = BatchSampler(augmented, view(index), 6, key)
    mixup = one_of({"mixup": (MIXINGS["mixup"], {})})
    sources: list[BatchSource] = [
        episodes,
        copies,
        batches,
        Mixed(episodes, mixup, 3),
        Mixed(batches, mixup, 4),
    ]
    for source in sources:
        for leaf in pytree.tree_leaves(source.draw(0, 2)):
            assert leaf.device.type == "meta"


def test_images_go_to_the_host_if_they_need_more_than_half_of_the_memory(monkeypatch):
    images, cuda = torch.zeros(10, 1, 10, 10, dtype=torch.uint8), torch.device("cuda")
    free: dict[str, int] = {}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"], 1 << 40))
    for free["bytes"], expected in ((2000, False), (1999, True)):
        assert is_too_large(images, cuda) == expected
    assert not is_too_large(images, torch.device("cpu"))


@pytest.mark.cuda
@pytest.mark.parametrize("case", _CASES)
def test_runs_on_host_and_gpu_are_the_same(case, make_run, tmp_path):
    outcomes = []
    for store in ("device", "host"):
        words = ["train.steps=12", "device=cuda", "engine.convolution=plain", *_CASES[case]]
        run = make_run(*words, f"dataset.store={store}")
        assert (run.data.stores["train"].images.device.type == "cpu") == (store == "host")
        outcomes.append(loop.fit(run, SILENT, tmp_path).state)
    for one, other in zip(*map(pytree.tree_leaves, outcomes), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)  # kernels add in any order
