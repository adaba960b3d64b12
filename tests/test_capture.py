"""What a CUDA graph requires of a meta-step, tested without a GPU, for every method."""

from collections.abc import Callable

import pytest
import torch
from torch.utils import _pytree as pytree

from metalearn.engine import Engine, capture
from metalearn.run.step import Training
from tests.fixtures import ALGORITHMS
from tests.test_contract import FEWER_STEPS, QUICK
from tests.test_host_store import Recorder

_METHODS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ALGORITHMS
]
#: The engine as on a GPU, on images; with all that a step can change.
_WORDS = [
    "device=cpu", "engine.strategy=vmap", "engine.task_chunk=2", "engine.convolution=unfold",
    "backbone.filters=4", "train.meta_batch=2", "train.batch_size=8", "train.steps=8",
    "train.schedule=cosine", "train.lr=0.01", "train.ema=0.9",
]  # fmt: skip


@pytest.fixture
def small_run(make_run):
    def make(name, *words):
        steps = [f"algo.{key}={value}" for key, value in FEWER_STEPS.get(name, ())]
        return make_run(f"algo={name}", *_WORDS, *steps, *words)

    return make


@pytest.mark.parametrize("name", _METHODS)
def test_no_method_reads_a_value_of_images_on_the_host(name, small_run):
    def to_meta(tree):
        return pytree.tree_map(lambda leaf: leaf.to("meta"), tree)

    run = small_run(name)
    state, progress = to_meta(run.state), torch.zeros((), device="meta")
    train, test = to_meta(run.train.draw(0, 2)), to_meta(run.test.draw(0, 2))
    for precision, convolution in (("fp32", "plain"), ("mixed", "unfold")):
        engine = Engine(run.algorithm, "vmap", 2, precision, convolution)
        step = engine.at(0.5).step(state, train, progress)
        assert all(value.is_meta for value in step.gradients.values())
        assert step.losses.is_meta and engine.predictions(state, test).is_meta


def training_as_on_cuda(run):
    """Return the training of a run with an optimiser that reads the learning rate from a tensor."""
    training = Training(run)
    rate, leaves = torch.tensor(run.config.train.lr), list(training.state.params.values())
    training.optimiser = torch.optim.Adam(leaves, lr=rate, fused=True)
    training.reads_host = False
    return training


def kept(training):
    """Return the tensors that a step changes."""
    content = training.state_dict()
    del content["best"]
    return [leaf for leaf in pytree.tree_leaves(content) if isinstance(leaf, torch.Tensor)]


def inputs_of(recorder):
    """Return the addresses of the tensors that recorded operations read and did not make."""
    made, inputs = set(), {}
    for _, args, kwargs, output in recorder.calls:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in made:
                inputs[leaf.data_ptr()] = leaf
        made |= {
            leaf.untyped_storage()._cdata
            for leaf in pytree.tree_leaves(output)
            if isinstance(leaf, torch.Tensor)
        }
    return inputs


def host_reads(recorder):
    """Return the names of the recorded operations that wait for the device."""
    reads = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    names = []
    for func, args, _, _ in recorder.calls:
        masks = [leaf for leaf in pytree.tree_leaves(args[1:]) if isinstance(leaf, torch.Tensor)]
        is_index = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put)
        if is_index:
            is_read = any(mask.dtype == torch.bool for mask in masks)
        else:
            is_read = bool(reads & set(func.tags))
        if is_read or func is torch.ops.aten._linalg_check_errors.default:
            names.append(func.name())
    return names


@pytest.mark.parametrize("name", _METHODS)
def test_steps_can_be_replayed_as_a_graph(name, small_run):
    """A replay of the operations of one step with the same tensors takes the next steps."""
    plain, captured = (training_as_on_cuda(small_run(name)) for _ in range(2))
    for training in (plain, captured):
        training.meta_step()
        training.count()
    addresses = [leaf.data_ptr() for leaf in kept(captured)]
    recorders = Recorder(), Recorder()
    for recorder in recorders:
        with recorder:
            captured.meta_step()
        captured.count()
        plain.meta_step()
        plain.count()
    assert host_reads(recorders[1]) == []
    assert inputs_of(recorders[0]).keys() == inputs_of(recorders[1]).keys()
    for _ in range(2):
        recorders[1].replay()
        captured.count()
        plain.meta_step()
        plain.count()
    assert [leaf.data_ptr() for leaf in kept(captured)] == addresses
    for one, other in zip(kept(captured), kept(plain), strict=True):
        assert torch.equal(one, other)


_READS: dict[str, Callable[[torch.Tensor], object]] = {
    "a value": lambda x: x[0].item(),
    "a condition": lambda x: bool(x[0] > 2),
    "a mask": lambda x: x[x > 0],
    "positions": torch.nonzero,
    "an error": lambda x: torch.linalg.solve(torch.eye(3), x),
}


@pytest.mark.parametrize("case", _READS)
def test_host_reads_are_recorded(case):
    with Recorder() as recorder:
        _READS[case](torch.ones(3))
    assert len(host_reads(recorder)) == 1


def test_new_inputs_are_recorded():
    x, constants = torch.ones(3), iter(range(3))

    def recorded(step):
        with Recorder() as recorder:
            step()
        return recorder

    same = [recorded(lambda: x.add_(x * 2)) for _ in range(2)]
    assert inputs_of(same[0]).keys() == inputs_of(same[1]).keys() == {x.data_ptr()}
    new = [recorded(lambda: x.add_(torch.tensor(next(constants)))) for _ in range(2)]
    assert inputs_of(new[0]).keys() != inputs_of(new[1]).keys()


def test_convolutions_are_timed_as_graphs(make_run, monkeypatch):
    """The one is chosen that is faster replayed, although it is slower before."""
    clock, notes = [0.0], []

    class Fake:
        def __init__(self, step, stage, device, reason_not_captured, report):
            self.engine, self.calls = step.func.__self__, 0
            notes.append(reason_not_captured)

        def __call__(self):
            self.calls += 1
            is_slow = (self.engine.convolution == "unfold") == (self.calls <= 4)
            clock[0] += 5.0 if is_slow else 1.0

    monkeypatch.setattr(capture, "Captured", Fake)
    monkeypatch.setattr(capture.time, "perf_counter", lambda: clock[0])
    run = make_run("algo=maml", "train.meta_batch=2", "device=cpu")
    chosen = run.train_engine.time_convolutions(run.state, run.train.draw(0, 2), "a reason")
    assert chosen.convolution == "unfold" and notes == ["a reason"] * 2
