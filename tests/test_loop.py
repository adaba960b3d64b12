"""The training loop: best checkpoint, early stopping, learning rate schedule, clipping."""

import copy
import dataclasses
import re

import pytest
import torch
from same_run import difference
from torch.utils import _pytree as pytree

from metalearn.config import checking, composition
from metalearn.report.progress import Listener
from metalearn.run import checkpoint, loop, optimisers, scoring
from metalearn.run.build import build
from metalearn.run.optimisers import clip_gradients
from metalearn.run.pairings import check
from metalearn.run.step import Training
from metalearn.run.train import _first_lines
from metalearn.system.errors import RunFailed, UserError
from metalearn.tasks.types import Estimate, State


class Rows(Listener):
    def __init__(self):
        self.rows = []

    def log(self, row):
        self.rows.append(row)

    def note(self, line):
        raise AssertionError(line)


def with_val_scores(monkeypatch, scores):
    """Make successive validations return these means."""
    means = iter(scores)
    monkeypatch.setattr(loop, "evaluate", lambda *_: torch.zeros(4))
    monkeypatch.setattr(loop, "estimate", lambda _: Estimate(next(means), 0.01, 4))


def test_best_validation_is_saved_and_patience_stops_training(make_run, tmp_path, monkeypatch):
    run = make_run("algo=protonet", "train.steps=50", "val.every=2", "train.patience=3")
    with_val_scores(monkeypatch, [0.3, 0.6, 0.5, 0.6, 0.4])
    tracker = Rows()
    fitted = loop.fit(run, tracker, tmp_path)
    assert (fitted.best_step, fitted.best_val.mean, fitted.steps) == (4, 0.6, 10)
    best = checkpoint.load(tmp_path / "checkpoints/best.pt", torch.device("cpu"))
    last = checkpoint.load(tmp_path / "checkpoints/last.pt", torch.device("cpu"))
    assert (best["step"], last["step"]) == (4, 10)
    assert all(torch.equal(fitted.state.params[name], best["meta"][name]) for name in best["meta"])
    assert not torch.equal(best["meta"]["net.conv0.weight"], last["meta"]["net.conv0.weight"])


def test_lower_error_is_better(make_run, tmp_path, monkeypatch):
    run = build(
        checking.check_config(
            composition.compose_config(
                ["algo=maml", "dataset=sinusoid", "train.steps=6", "val.every=2"]
            )
        )
    )
    with_val_scores(monkeypatch, [3.0, 1.0, 2.0])
    assert loop.fit(run, Rows(), tmp_path).best_step == 4


def test_population_statistics_follow_a_moving_average(make_run, tmp_path):
    run = make_run("algo=protonet", "train.steps=1", "train.statistics_momentum=0.25")
    before = {name: value.clone() for name, value in run.state.buffers.items()}
    seen = run.train_engine.step(run.state, run.train.draw(0, 1), torch.zeros(())).statistics
    fitted = loop.fit(run, Rows(), tmp_path)
    for name, value in fitted.state.buffers.items():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * seen[name])


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, (1 + 2**-0.5) / 2, 0.5, (1 - 2**-0.5) / 2]),
        ("step", [1, 1, 0.5, 0.5]),
        ("milestones", [1, 1, 0.5, 0.25]),
    ],
)
def test_learning_rate_follows_its_schedule(schedule, expected, make_run, tmp_path, monkeypatch):
    run = make_run(
        "algo=reptile", "train.optimiser=sgd", "train.lr=2", f"train.schedule={schedule}",
        "train.steps=4", "train.schedule_every=2", "train.schedule_factor=0.5",
        "train.milestones=[0.5,3]",
    )  # fmt: skip
    weights = [run.state.params["head.weight"].clone()]
    gradients = []
    step = type(run.train_engine).step

    def recording_step(engine, state, tasks, *rest):
        result = step(engine, state, tasks, *rest)
        weights.append(state.params["head.weight"].clone())
        gradients.append(result.gradients["head.weight"])
        return result

    monkeypatch.setattr(type(run.train_engine), "step", recording_step)
    loop.fit(run, Rows(), tmp_path)
    weights = [*weights[2:], run.state.params["head.weight"]]
    before = weights[:-1]
    for number in range(len(before)):
        torch.testing.assert_close(
            before[number] - weights[number + 1], 2 * expected[number + 1] * gradients[number + 1]
        )


def test_warmup_multiplies_any_schedule():
    train = checking.check_config(composition.compose_config([])).train

    def rates(**settings):
        changed = dataclasses.replace(train, steps=8, milestones=[0.25], **settings)
        return torch.tensor([optimisers.learning_rate(changed, step) for step in range(8)])

    share = torch.tensor([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])
    for schedule in ("constant", "linear", "cosine", "step", "milestones"):
        expected = share * rates(schedule=schedule)
        torch.testing.assert_close(rates(schedule=schedule, warmup=4), expected)


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        ([], []),
        (["train.warmup=2", "train.steps=2"], []),
        (["train.warmup=2", "train.steps=0"], []),
        (["train.warmup=3"], [r"train\.warmup=3: longer than train\.steps=2, so the learning"]),
        (["train.milestones=[0.5]", "train.schedule=milestones"], []),
        (["train.milestones=[0.5]"], [r"train\.milestones=\[0\.5\]: .* train\.schedule=constant"]),
        (["episode.unbalanced=true", "episode.shot=[1,2]"], []),
        (["episode.train.unbalanced=true"], [r"^episode\.train\.unbalanced=true: has no effect"]),
        (["episode.unbalanced=true", "episode.train.shot=2"], [r"^episode\.unbalanced=.*shot=2"]),
    ],
)  # fmt: skip
def test_a_run_names_settings_without_effect(overrides, lines, make_run):
    """One line each, among those that a run prints first."""
    shown = _first_lines(make_run("algo=protonet", *overrides), "protonet", "", True)[2:]
    assert len(shown) == len(lines)
    for line, expected in zip(shown, lines, strict=True):
        assert re.search(expected, line)


def test_moving_average_is_validated_tested_and_saved(make_run, tmp_path, monkeypatch):
    run = make_run("algo=protonet", "train.ema=0.25", "train.steps=3", "train.log_every=1")
    expected = State(*(pytree.tree_map(torch.clone, part) for part in run.state))
    seen = []
    original = Training.meta_step

    def meta_step(training):
        number = training.step
        original(training)
        decay = min(0.25, (1 + number) / (10 + number))
        for part, new in zip(expected, training.state, strict=True):
            for name, value in part.items():
                value.mul_(decay).add_((1 - decay) * new[name].detach())
        seen.append(training)

    monkeypatch.setattr(Training, "meta_step", meta_step)
    fitted = loop.fit(run, Rows(), tmp_path)
    content = checkpoint.load(tmp_path / "checkpoints/best.pt", torch.device("cpu"))
    for part, stored in zip(expected, (content["meta"], content["fixed"]), strict=True):
        torch.testing.assert_close(part, stored)
    assert difference(fitted.state.params, content["meta"]) is None
    scores = scoring.evaluate(run, fitted.state, run.val, 4)
    torch.testing.assert_close(scores.mean().item(), fitted.best_val.mean)
    last = checkpoint.load(tmp_path / "checkpoints/last.pt", torch.device("cpu"))
    name = "net.conv0.weight"
    assert torch.equal(last["meta"][name], seen[-1].state.params[name].detach())
    assert not torch.equal(last["meta"][name], content["meta"][name])


def test_gradients_are_clipped_by_value_and_norm():
    def settings(clip_value=None, clip_norm=None):
        train = checking.check_config(composition.compose_config([])).train
        return dataclasses.replace(train, clip_value=clip_value, clip_norm=clip_norm)

    gradients = {"a": torch.tensor([3.0, -4.0])}
    assert clip_gradients(gradients, settings())[0].tolist() == [3, -4]
    assert clip_gradients(gradients, settings(clip_value=2))[0].tolist() == [2, -2]
    torch.testing.assert_close(
        clip_gradients(gradients, settings(clip_norm=1))[0], torch.tensor([0.6, -0.8])
    )
    torch.testing.assert_close(
        clip_gradients(gradients, settings(clip_norm=10))[0], torch.tensor([3.0, -4.0])
    )


@pytest.mark.parametrize("reads_host", [True, False])
@pytest.mark.parametrize(
    "optimiser",
    [
        ["optimiser=adamw", "optimiser.weight_decay=0.1", "train.ema=0.5"],
        ["optimiser=sgd", "optimiser.weight_decay=0.1"],
        ["optimiser=sgd", "optimiser.momentum=0.9", "optimiser.weight_decay=0.1"],
    ],
)
def test_nonfinite_step_changes_nothing(optimiser, reads_host, make_run, monkeypatch):
    run = make_run("algo=protonet", "train.nonfinite=skip", *optimiser)
    training = Training(run)
    training.reads_host = reads_host
    original = type(run.train_engine).step

    def step():
        training.meta_step()
        training.count()

    def snapshot():
        content = training.state_dict()
        parts = ("meta", "fixed", "optimiser", "average")
        return copy.deepcopy({name: content.get(name) for name in parts})

    def nan_step(*arguments):
        result = original(*arguments)
        return result._replace(
            gradients=pytree.tree_map(lambda leaf: leaf * torch.nan, result.gradients)
        )

    monkeypatch.setattr(type(run.train_engine), "step", nan_step)
    before = snapshot()
    step()  # before the optimiser has any state
    assert difference(snapshot(), before) is None
    monkeypatch.setattr(type(run.train_engine), "step", original)
    step()
    before = snapshot()
    monkeypatch.setattr(type(run.train_engine), "step", nan_step)
    step()
    assert difference(snapshot(), before) is None
    monkeypatch.setattr(type(run.train_engine), "step", original)
    step()
    after = snapshot()
    assert not torch.equal(after["meta"]["net.conv0.weight"], before["meta"]["net.conv0.weight"])
    assert training.meter.skipped()[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["optimiser._target_=torch.optim.LBFGS"], "LBFGS: is not possible here"),
        (["optimiser._target_=torch.optim.SparseAdam"], "SparseAdam: is not possible here"),
        (
            ["optimiser._target_=torch.optim.lr_scheduler.StepLR"],
            "should name an optimiser of torch",
        ),
        (["optimiser._target_=os.system"], "should name an optimiser of torch"),
        (["optimiser._target_=torch.optim.AdmW"], "did you mean torch.optim.Adam"),
        (["+optimiser.momentum=0.9"], r"optimiser\.momentum: Adam has no such setting"),
        (["+optimiser.lr=0.9"], r"optimiser\.lr: Adam has no such setting"),
        (["optimiser.eps=-1"], "Adam refuses its settings"),
        (["train.schedule=milestones"], r"set train\.milestones, like \[0\.6,0\.8\]"),
        (
            ["optimiser=sgd", "optimiser.nesterov=off"],
            r"optimiser\.nesterov=off: should be true or false",
        ),
        (["optimiser._target_=torch.optim.Muon"], "Muon: is not possible here"),
        (
            ["+augment.ops.horizontal_flip=3"],
            r"augment\.ops\.horizontal_flip=3: should hold settings",
        ),
    ],
)
def test_invalid_optimisers_are_refused(overrides, line, compose):
    with pytest.raises(UserError, match=line):
        check(checking.check_config(compose("algo=protonet", *overrides)))


@pytest.mark.slow
@pytest.mark.slow
def test_optimisers_have_their_torch_defaults(make_run):
    for overrides, kind, expected in (
        (["train.optimiser=sgd"], torch.optim.SGD, {"momentum": 0.0}),
        (["algo=reptile"], torch.optim.SGD, {"weight_decay": 0.0}),
        (["algo=reptile", "train.optimiser=adam"], torch.optim.Adam, {"betas": [0.9, 0.999]}),
        (
            ["optimiser=adamw", "optimiser.weight_decay=0.3"],
            torch.optim.AdamW,
            {"weight_decay": 0.3},
        ),
        (
            ["~optimiser", "+optimiser._target_=torch.optim.RMSprop"],
            torch.optim.RMSprop,
            {"alpha": 0.99},
        ),
    ):
        optimiser = Training(make_run("algo=protonet", "train.lr=0.25", *overrides)).optimiser
        assert type(optimiser) is kind
        group = optimiser.param_groups[0]
        assert group["lr"] == 0.25 and all(
            list(group[k]) == v if isinstance(v, list) else group[k] == v
            for k, v in expected.items()
        )


def test_nonfinite_loss_ends_the_run(make_run, tmp_path):
    run = make_run(
        "algo=maml",
        "algo.inner_lr=1e38",
        "algo.inner_steps=3",
        "train.steps=3",
        "train.log_every=1",
    )
    with pytest.raises(RunFailed, match="at step"):
        loop.fit(run, Rows(), tmp_path)


def test_evaluation_does_not_depend_on_its_batch_size_and_builds_no_graph(make_run):
    run = make_run("algo=maml", "test.episodes=10")
    scores = scoring.test(run, run.state, None).scores
    torch.testing.assert_close(
        scoring.test(dataclasses.replace(run, test_batch=3), run.state, None).scores, scores
    )
    learning = State(
        {name: value.requires_grad_() for name, value in run.state.params.items()},
        run.state.buffers,
    )
    assert not run.test_engine.predictions(learning, run.test.draw(0, 2)).requires_grad


def test_nonfinite_validation_ends_the_run(tmp_path):
    overrides = [
        "algo=maml",
        "dataset=sinusoid",
        "train.steps=0",
        "algo.inner_lr=1e30",
        "val.episodes=4",
    ]
    run = build(checking.check_config(composition.compose_config(overrides)))
    with pytest.raises(RunFailed, match=r"val\.mse"):
        loop.fit(run, Rows(), tmp_path)


def test_invalid_checkpoints_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    for content in (b"", b"nonsense"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.pt"):
            checkpoint.load(path, torch.device("cpu"))
    torch.save({"code": RunFailed("x")}, path)
    with pytest.raises(UserError, match=r"x\.pt"):
        checkpoint.load(path, torch.device("cpu"))


@pytest.mark.slow
def test_method_enters_its_next_stage_on_time(make_run, monkeypatch):
    run = make_run(
        "algo=maml_pp", "algo.multi_step_share=0.5", "train.steps=4", "engine.convolution=plain"
    )
    calls: list[int] = []

    def step_weights(self, steps, progress):
        calls.append(steps)
        return torch.ones(steps)

    monkeypatch.setattr(type(run.algorithm), "step_weights", step_weights)
    training, engines = Training(run), []
    for _ in range(4):
        engines.append(training.engine)
        training.meta_step()
        training.count()
    assert calls == [5, 5]
    assert engines[0] is engines[1] is not engines[2] is engines[3]
    resumed = Training(run)
    resumed.load_state_dict(training.state_dict() | {"step": 2, "best": None})
    assert resumed.engine == engines[2]
