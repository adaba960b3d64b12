"""The engine's choices, and that none of them changes the results."""

import dataclasses
import gzip
import json
from itertools import accumulate

import pytest
import torch
from rich.console import Console
from torch.utils import _pytree as pytree

from metalearn.engine import Engine, memory, process
from metalearn.engine.capture import Captured
from metalearn.report.progress import SILENT, Listener
from metalearn.run import loop
from metalearn.run.train import train
from metalearn.system.errors import RunFailed, UserError
from tests.fixtures import SMALL, to_float64

_HALF = torch.tensor(0.5)
_PLAIN, _DIRECT = "engine.convolution=plain", "engine.convolution=direct"


def test_number_of_episodes_at_once(make_run, monkeypatch):
    episode = make_run("algo=maml").test.draw(0, 1)
    own = sum(leaf.nbytes for leaf in pytree.tree_leaves(episode))
    monkeypatch.setattr(process, "ALL_THREADS", 3)

    def on_cpu(inputs, most=1 << 30):
        monkeypatch.setattr(memory, "_CPU_BYTES", inputs)
        monkeypatch.setattr(memory, "_MOST_CPU_BYTES", most)
        return memory.episodes_at_once(torch.device("cpu"), episode)

    assert [on_cpu(100 * own), on_cpu(own), on_cpu(own, 5 * own), on_cpu(1, 1)] == [96, 48, 5, 1]
    used = [1000]
    for name, value in (
        ("reset_peak_memory_stats", lambda device: None),
        ("memory_allocated", lambda device: 1000),
        ("max_memory_allocated", lambda device: used[-1]),
        ("mem_get_info", lambda device: (20_000, 30_000)),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    evaluate = lambda count: used.append(1000 + 250 * count)  # noqa: E731
    assert memory.episodes_at_once(torch.device("cuda"), episode, evaluate) == 40


def cosine(first, second):
    first, second = (
        torch.cat([leaf.flatten().double() for leaf in tree.values()]) for tree in (first, second)
    )
    return float(first @ second / first.norm() / second.norm())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["algo=maml", "episode.train.query=1", "train.meta_batch=4"], "vmap"),
        (["algo=maml", "episode.train.query=15", "train.meta_batch=4", _PLAIN], "mixed"),
        (["algo=maml", "episode.train.query=15", "train.meta_batch=4", _DIRECT], "vmap"),
        (["algo=maml", "train.meta_batch=1"], "loop"),
        (["algo=protonet", "train.meta_batch=4", _DIRECT], "vmap"),
        (["algo=protonet", "train.meta_batch=4", _PLAIN], "loop"),
        (["algo=protonet", "train.meta_batch=1", _DIRECT], "loop"),
        (["algo=reptile", "episode.train.query=15", "train.meta_batch=4"], "vmap"),
        (["algo=protonet", "episode.train.query=1", "train.meta_batch=4", _PLAIN], "loop"),
        (["algo=maml", "engine.strategy=loop", "train.meta_batch=4"], "loop"),
        (["algo=reptile", "engine.strategy=mixed", "train.meta_batch=4"], "vmap"),
    ],
)
def test_auto_strategy_follows_its_rule(overrides, expected, make_run):
    assert make_run(*overrides, "device=cpu").train_engine.strategy == expected


def test_a_token_counts_as_a_vector_of_numbers_in_the_size_of_a_chunk(make_run):
    # 349 tasks of 25 texts at once needed 20 GB of a small transformer.
    run = make_run("algo=maml")
    tasks = run.test.draw(0, 1)
    tokens = pytree.tree_map(lambda leaf: leaf.long(), tasks)
    numbers, texts = (
        Engine(run.algorithm, "vmap", 0).resolve(some, 10**6, False).chunk
        for some in (tasks, tokens)
    )
    assert 1 <= texts <= numbers // 50


def test_chunk_is_at_most_the_meta_batch(make_run):
    assert (
        make_run("algo=maml", "train.meta_batch=4", "engine.task_chunk=3").train_engine.chunk == 3
    )
    assert (
        make_run("algo=maml", "train.meta_batch=4", "engine.task_chunk=9").train_engine.chunk == 4
    )


def test_transfer_methods_batch_their_adaptation_in_tests(make_run):
    assert (
        make_run("algo=finetune", "episode.query=15", "device=cpu", _PLAIN).test_engine.strategy
        == "mixed"
    )
    assert (
        make_run("algo=protonet", "episode.query=15", "device=cpu", _PLAIN).test_engine.strategy
        == "loop"
    )


@pytest.mark.slow
@pytest.mark.parametrize("downsample", ["pool", "stride"])
@pytest.mark.parametrize("normalisation", ["batch", "none"])
def test_unfold_convolution_equals_plain_convolution(downsample, normalisation, make_run):
    backbone = [f"backbone.downsample={downsample}", f"backbone.normalisation={normalisation}"]
    run = make_run("algo=maml", "algo.inner_steps=2", *backbone)
    tasks, state = to_float64(run.train.draw(0, 3)), to_float64(run.state)
    plain = Engine(run.algorithm, "vmap", 3).step(state, tasks, _HALF.double())
    unfolded = Engine(run.algorithm, "vmap", 3, convolution="unfold").step(
        state, tasks, _HALF.double()
    )
    torch.testing.assert_close(unfolded.gradients, plain.gradients, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("algorithm", "steps", "queries", "tolerance"),
    [("maml", 1, 1, 1e-5), ("maml", 1, 15, 1e-5), ("protonet", 0, 15, 1e-4)]
    + [pytest.param("maml", 5, queries, 1e-4, marks=pytest.mark.slow) for queries in (1, 15)],
)
def test_float32_gradients_of_every_strategy_are_accurate(
    algorithm, steps, queries, tolerance, make_run
):
    """The images have a background, so many pre-activations are equal."""
    inner = [f"algo.inner_steps={steps}"] if steps else []
    run = make_run(f"algo={algorithm}", *inner, "episode.train.shot=1",
        f"episode.train.query={queries}", "dataset.image_size=28", "backbone.filters=16",
    )  # fmt: skip
    tasks = run.train.draw(0, 2)

    def gradients(strategy, state, tasks, progress):
        step = Engine(run.algorithm, strategy, 2).step(state, tasks, progress)
        return torch.cat([value.flatten() for value in step.gradients.values()]).double()

    exact = gradients("loop", to_float64(run.state), to_float64(tasks), _HALF.double())
    for strategy in ("loop", "mixed", "vmap") if steps else ("loop", "vmap"):
        error = (gradients(strategy, run.state, tasks, _HALF) - exact).norm() / exact.norm()
        assert error < tolerance, strategy


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["vmap", "loop", "mixed"])
@pytest.mark.parametrize("part", ["all", "head"])
def test_rematerialisation_changes_no_gradient(strategy, part, make_run):
    run = make_run("algo=maml", "algo.inner_steps=3", f"algo.adapted_part={part}")
    checkpointed = make_run(
        "algo=maml", "algo.inner_steps=3", f"algo.adapted_part={part}", "engine.rematerialise=true"
    )
    assert checkpointed.algorithm.rematerialise
    assert not run.algorithm.rematerialise
    tasks, state = to_float64(run.train.draw(0, 3)), to_float64(run.state)
    expected, gradients = (
        Engine(algorithm, strategy, 3).step(state, tasks, _HALF.double()).gradients
        for algorithm in (run.algorithm, checkpointed.algorithm)
    )
    torch.testing.assert_close(gradients, expected, rtol=1e-7, atol=1e-9)


def peak_memory(run):
    """Return the most memory that the tensors of one meta-step take at a time, in bytes."""
    tasks = run.train.draw(0, 4)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(
        activities=activities, profile_memory=True, acc_events=True
    ) as profile:
        run.train_engine.step(run.state, tasks, torch.zeros(()))
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.slow
def test_rematerialisation_saves_memory_in_long_inner_loops(make_run):
    def growth(*more):
        short, long = (
            make_run(
                "algo=maml",
                f"algo.inner_steps={steps}",
                "train.meta_batch=4",
                "engine.strategy=vmap",
                *more,
            )
            for steps in (3, 8)
        )
        return peak_memory(long) - peak_memory(short)

    assert growth("engine.rematerialise=true") < growth() / 10


def test_rematerialisation_without_inner_steps_is_refused(make_run):
    with pytest.raises(UserError, match=r"engine\.rematerialise=true: ProtoNet"):
        make_run("algo=protonet", "engine.rematerialise=true")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fomaml", "protonet", "reptile"])
def test_bf16_agrees_in_gradient_direction_and_accuracy(name, make_run):
    run = make_run(f"algo={name}", "train.meta_batch=4", "backbone.filters=32", "test.episodes=40")
    rough = make_run(
        f"algo={name}", "train.meta_batch=4", "backbone.filters=32", "engine.precision=bf16"
    )
    tasks = run.train.draw(0, 4)
    exact, low = (one.train_engine.step(run.state, tasks, _HALF) for one in (run, rough))
    # Not 1: the lower precision is really used.
    assert 0.9 < cosine(exact.gradients, low.gradients) < 0.999999
    assert all(value.dtype == torch.float32 for value in low.gradients.values())
    tasks = run.test.draw(0, 40)
    predictions = [one.test_engine.predictions(run.state, tasks) for one in (run, rough)]
    assert predictions[1].dtype == torch.float32
    accuracies = [float(run.metric.of(one, tasks.query.y).mean()) for one in predictions]
    assert abs(accuracies[0] - accuracies[1]) < 0.03


@pytest.mark.parametrize("convolution", ["plain", "unfold", "direct"])
@pytest.mark.parametrize("name", ["maml", "protonet"])
def test_mixed_gradients_agree_though_products_are_rounded(name, convolution, make_run):
    run = make_run(f"algo={name}", "train.meta_batch=4", f"engine.convolution={convolution}")
    tasks, steps = run.train.draw(0, 4), {}
    for strategy in ("vmap", "loop"):
        for precision in ("fp32", "mixed"):
            engine = Engine(run.algorithm, strategy, 2, precision, convolution)
            steps[strategy, precision] = engine.step(run.state, tasks, _HALF)
        exact, mixed = steps[strategy, "fp32"], steps[strategy, "mixed"]
        # The primal values are those of float32: no ReLU flips, which autocast is wrong by.
        assert torch.equal(exact.losses, mixed.losses)
        assert all(value.dtype == torch.float32 for value in mixed.gradients.values())
        assert 1e-7 < 1 - cosine(exact.gradients, mixed.gradients) < 1e-3


def test_autocast_is_refused_for_second_order_methods(make_run):
    with pytest.raises(UserError, match=r"engine\.precision=bf16: MAML .*mixed or fp32"):
        make_run("algo=maml", "engine.precision=bf16")
    with pytest.raises(UserError, match=r"engine\.rematerialise=true: engine\.precision=mixed"):
        make_run("algo=maml", "engine.precision=mixed", "engine.rematerialise=true")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["vmap", "loop"])
@pytest.mark.parametrize("name", ["relation", "r2d2"])
def test_bf16_gradients_agree_for_learned_heads(name, strategy, make_run):
    overrides = [
        f"algo={name}",
        "train.meta_batch=2",
        "backbone.halvings=2",
        f"engine.strategy={strategy}",
    ]
    run, rough = make_run(*overrides), make_run(*overrides, "engine.precision=bf16")
    tasks = run.train.draw(0, 2)
    exact, low = (one.train_engine.step(run.state, tasks, _HALF) for one in (run, rough))
    assert cosine(exact.gradients, low.gradients) > 0.9


@pytest.mark.slow
def test_bf16_run_completes(compose, tmp_path):
    config = compose("algo=protonet", "engine.precision=bf16", "train.steps=2", "val.every=1")
    train(config, tmp_path / "run", "protonet", [], Console(quiet=True))
    assert (
        json.loads((tmp_path / "run/result.json").read_text())["engine"]["train"]["precision"]
        == "bf16"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="requires a machine without CUDA")
def test_tf32_requires_cuda(make_run):
    with pytest.raises(UserError, match=r"engine\.precision=tf32: requires a CUDA"):
        make_run("algo=maml", "engine.precision=tf32")


@pytest.mark.slow
def test_out_of_memory_error_names_a_chunk_that_fits(make_run):
    run = make_run("algo=protonet")
    tasks = run.train.draw(0, 12)

    def attempt(size, few):
        if few.key.shape[0] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with (
        pytest.raises(RunFailed, match=r"12 tasks per chunk; engine\.task_chunk=3 fits"),
        memory.suggest_chunk(attempt, tasks, 30),
    ):
        attempt(30, tasks)

    def hopeless(size, few):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with (
        pytest.raises(
            RunFailed, match="out of memory with 4 tasks per chunk, then with a single task"
        ),
        memory.suggest_chunk(hopeless, tasks, 4),
    ):
        hopeless(4, tasks)

    def broken(size, few):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"), memory.suggest_chunk(broken, tasks, 4):
        broken(4, tasks)


@pytest.mark.slow
def test_out_of_memory_command_suggests_a_chunk(metalearn):
    arguments = [
        "train",
        "algo=maml",
        *SMALL,
        "dataset.image_size=28",
        "backbone.filters=64",
        "train.meta_batch=400",
    ]
    arguments += [
        "engine.strategy=vmap",
        "engine.task_chunk=400",
        "algo.inner_steps=5",
        "device=cpu",
    ]
    done = metalearn(*arguments, memory=6 << 30)
    assert done.returncode == 1
    # The chunk that fits is hard to predict: unlike GPU memory, address space is not freed.
    assert "out of memory with 400 tasks per chunk" in done.stderr
    assert "engine.task_chunk=" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_out_of_memory_while_preparing_data_names_the_image_size(metalearn):
    done = metalearn(
        "train", "algo=protonet", *SMALL, "dataset.image_size=1024", "device=cpu", memory=6 << 30
    )
    assert done.returncode == 1 and "dataset.image_size" in done.stderr
    assert done.stderr.startswith("metalearn: out of memory") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_engine_choices_are_saved_and_reused(compose, tmp_path):
    first = compose("algo=maml", "train.meta_batch=4", "train.steps=2", "engine.strategy=loop")
    train(first, tmp_path / "first", "maml", [], Console(quiet=True))
    file = tmp_path / "first/engine.json"
    chosen = json.loads(file.read_text())
    assert (chosen["train"]["strategy"], chosen["train"]["chunk"]) == ("loop", 1)
    assert chosen["threads"] == torch.get_num_threads()
    again = compose("algo=maml", "train.meta_batch=4", "train.steps=2", f"engine.choices={file}")
    train(again, tmp_path / "again", "maml", [], Console(quiet=True))
    results = [
        json.loads((tmp_path / folder / "result.json").read_text()) for folder in ("first", "again")
    ]
    assert results[0]["engine"] == results[1]["engine"]
    states = [
        torch.load(tmp_path / folder / "checkpoints/last.pt", weights_only=True)
        for folder in ("first", "again")
    ]
    assert all(
        torch.equal(states[0]["meta"][name], states[1]["meta"][name]) for name in states[0]["meta"]
    )


@pytest.mark.slow
@pytest.mark.slow
def test_invalid_engine_choices_are_refused(make_run, tmp_path):
    right = {"strategy": "vmap", "chunk": 2, "precision": "fp32", "convolution": "plain"}
    wrong = [
        right | change
        for change in ({"strategy": "foo"}, {"chunk": 0}, {"chunk": True}, {"precision": "fp16"})
    ]
    contents = ["", "{}", '{"threads": 1, "train": {}, "test": {}}', "[1]"]
    contents += [json.dumps({"threads": 1, "train": right, "test": one}) for one in wrong]
    contents += [json.dumps({"threads": -1, "train": right, "test": right})]
    for content in contents:
        (tmp_path / "engine.json").write_text(content)
        with pytest.raises(UserError, match=r"is not an engine\.json"):
            make_run("algo=maml", f"engine.choices={tmp_path}/engine.json")
    with pytest.raises(
        UserError, match=r"engine\.strategy=vmap: engine\.choices already sets this"
    ):
        make_run("algo=maml", "engine.strategy=vmap", f"engine.choices={tmp_path}/engine.json")


def test_mixed_choices_are_refused_for_a_method_with_its_own_loss(make_run, tmp_path):
    run = make_run("algo=maml", "train.meta_batch=4", "episode.train.query=15", _PLAIN)
    assert run.train_engine.strategy == "mixed"
    (tmp_path / "engine.json").write_text(json.dumps(run.choices))
    with pytest.raises(UserError, match="a method with its own loss"):
        make_run("algo=reptile", "train.meta_batch=4", f"engine.choices={tmp_path}/engine.json")


@pytest.mark.slow
def test_rematerialisation_recomputes_in_the_same_precision(make_run):
    overrides = ["algo=maml", "algo.inner_steps=3", "train.meta_batch=4", "backbone.filters=32"]
    runs = make_run(*overrides), make_run(*overrides, "engine.rematerialise=true")
    tasks = runs[0].train.draw(0, 4)
    gradients = [
        dataclasses.replace(run.train_engine, precision="bf16", convolution="plain")
        .step(run.state, tasks, _HALF)
        .gradients
        for run in runs
    ]
    assert cosine(*gradients) > 0.9999


@pytest.mark.slow
def test_zero_threads_restores_all_threads(make_run, monkeypatch):
    monkeypatch.setattr(process, "ALL_THREADS", 2)
    before = torch.get_num_threads()
    try:
        make_run("algo=protonet", "engine.threads=1")
        assert torch.get_num_threads() == 1
        make_run("algo=protonet", "engine.threads=0")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_profile_writes_a_page_and_a_trace(compose, tmp_path):
    config = compose("algo=maml", "engine.profile=true", "train.steps=4", "val.every=4")
    train(config, tmp_path / "run", "maml", [], Console(quiet=True))
    page = (tmp_path / "run/profile/summary.md").read_text()
    assert "Steps 3 to 4" in page
    assert "draw tasks" in page
    assert "convolution" in page
    assert page.count("\n") < 60
    with gzip.open(tmp_path / "run/profile/trace.json.gz") as stream:
        assert json.load(stream)["traceEvents"]


def test_without_cuda_the_step_is_called_directly():
    calls: list[int] = []
    notes: list[str] = []
    step = Captured(
        lambda: calls.append(1),
        lambda: None,
        torch.device("cpu"),
        "engine.cuda_graph=false",
        notes.append,
    )
    for _ in range(5):
        step()
    assert (len(calls), notes, step._graph) == (5, [], None)


def on_cuda(make_run, *overrides):
    return make_run(
        "device=cuda",
        "train.meta_batch=8",
        "train.steps=12",
        "val.every=12",
        "train.log_every=12",
        *overrides,
    )


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["maml", "reptile", "protonet", "maml_pp"])
def test_cuda_graph_run_equals_plain_run(name, make_run, tmp_path):
    class Notes(Listener):
        def note(self, line):
            notes.append(line)

    notes: list[str] = []
    overrides = [f"algo={name}", "engine.convolution=plain", "train.schedule=cosine"]
    if name == "maml_pp":  # the next stage requires a new capture
        overrides += ["algo.multi_step_share=0.5"]
    graph = loop.fit(on_cuda(make_run, *overrides), Notes(), tmp_path / "graph").state
    assert notes == []  # the capture succeeded
    plain = loop.fit(
        on_cuda(make_run, *overrides, "engine.cuda_graph=false"), Notes(), tmp_path / "plain"
    ).state
    assert notes == ["no CUDA graph: engine.cuda_graph=false"]
    for part in ("params", "buffers"):
        torch.testing.assert_close(getattr(graph, part), getattr(plain, part), rtol=1e-3, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["maml", "reptile", "protonet", "maml_pp"])
@pytest.mark.parametrize("graph", ["true", "false"])
def test_no_step_waits_for_the_device(name, graph, make_run, tmp_path, monkeypatch):
    run = on_cuda(make_run, f"algo={name}", f"engine.cuda_graph={graph}")
    call = Captured.__call__

    def call_without_sync(captured):
        torch.cuda.set_sync_debug_mode("error")
        try:
            call(captured)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Captured, "__call__", call_without_sync)
    loop.fit(run, SILENT, tmp_path)


@pytest.mark.cuda
def test_failed_capture_continues_and_reports_why():
    value = torch.zeros((), device="cuda")
    notes: list[str] = []

    def step():
        value.add_(1)
        value.item()

    captured = Captured(step, lambda: None, value.device, None, notes.append)
    for _ in range(6):
        captured()
    assert value.item() == 6
    assert captured._graph is None
    assert notes[0].startswith("no CUDA graph: capture failed (")


@pytest.mark.cuda
def test_faster_convolution_is_chosen_by_timing(make_run):
    run = on_cuda(make_run, "algo=maml")
    assert run.train_engine.convolution in ("plain", "unfold")
    assert run.test_engine.convolution == run.train_engine.convolution


@pytest.mark.cuda
def test_tf32_gradients_are_close(make_run):
    tasks = on_cuda(make_run, "algo=maml").train.draw(0, 8)
    exact = on_cuda(make_run, "algo=maml")
    gradients = exact.train_engine.step(exact.state, tasks, _HALF.cuda()).gradients
    rough = on_cuda(make_run, "algo=maml", "engine.precision=tf32")
    assert torch.backends.cudnn.allow_tf32
    assert (
        cosine(gradients, rough.train_engine.step(exact.state, tasks, _HALF.cuda()).gradients)
        > 0.99
    )
    on_cuda(make_run, "algo=maml")
    assert not torch.backends.cudnn.allow_tf32
