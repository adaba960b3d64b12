"""A plugin adds methods, tasks, inputs, losses and augmentations without other changes."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from rich.console import Console

import metalearn
from metalearn import testing
from metalearn.config import checking, composition, plugins
from metalearn.engine import Engine
from metalearn.report.progress import SILENT, Listener
from metalearn.report.stats import estimate, paired_difference
from metalearn.run import loop, scoring
from metalearn.run.build import build
from metalearn.run.evaluate import evaluate
from metalearn.run.train import train
from metalearn.system.errors import UserError
from metalearn.tasks.types import InputSpec, Support
from tests.fixtures import to_float64
from tests.test_text import write_csv
from tests.toys import Bag

_TOYS = ["transfer", "multi_step", "sequence", "ridge", "soft_means"]
_SMALL = [
    "val.episodes=20",
    "test.episodes=20",
    "logger=none",
    "train.meta_batch=4",
    "device=cpu",
    "train.lr=0.01",
]


@pytest.fixture(autouse=True)
def toy_plugin(monkeypatch):
    """Load the plugin for one test."""
    monkeypatch.setattr(plugins, "_named", ["tests.toys"])


def settings_of(*overrides):
    return checking.check_config(composition.compose_config([*_SMALL, *overrides]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "soft_means",
        *(pytest.param(name, marks=pytest.mark.slow) for name in _TOYS if name != "soft_means"),
    ],
)
def test_toy_methods_run_in_the_engine_and_the_loop(name, tmp_path):
    run = build(
        settings_of(
            f"algo={name}",
            "dataset=gaussians",
            "train.steps=3",
            "val.every=3",
            "train.batch_size=8",
        )
    )

    class Positive(Listener):
        def log(self, row):
            assert row["train.loss"] > 0

    before = {key: value.clone() for key, value in run.state.params.items()}
    fitted = loop.fit(run, Positive(), tmp_path)
    assert [key for key in before if not torch.equal(before[key], run.state.params[key])] == list(
        before
    )
    assert scoring.test(run, fitted.state, None).scores.shape == (20,)
    tasks, state = to_float64(run.train.draw(0, 3)), to_float64(run.state)
    progress = torch.zeros((), dtype=torch.float64)
    steps = [
        Engine(run.algorithm, one, 3).step(state, tasks, progress).gradients
        for one in ("vmap", "loop")
    ]
    torch.testing.assert_close(*steps, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transfer", "soft_means"])
def test_toy_methods_pass_the_method_checks(name):
    for check in testing.METHOD_CHECKS.values():
        check(testing.Method(name))


@pytest.mark.slow
def test_unlabelled_examples_of_the_classes_help_and_distractors_hurt(tmp_path):
    overrides = [
        "algo=soft_means",
        "dataset=gaussians",
        "train.steps=60",
        "val.every=60",
        "dataset.noise_std=0.5",
    ]
    overrides += [
        "test.episodes=300",
        "episode.unlabelled=8",
        "episode.query=5",
        "train.meta_batch=2",
    ]
    run = build(settings_of(*overrides))
    state = loop.fit(run, SILENT, tmp_path).state
    scores = scoring.test(run, state, None).scores

    @dataclasses.dataclass
    class Without:
        def draw(self, first, count):
            task = run.test.draw(first, count)
            support = dataclasses.replace(task.support, unlabelled=task.support.x)  # adds nothing
            return dataclasses.replace(task, support=support)

        def classes(self, first, count):
            return run.test.classes(first, count)

    gain = paired_difference(scores, scoring.evaluate(run, state, Without(), 300))
    assert gain.mean - gain.ci95 > 0
    with_distractors = build(settings_of(*overrides, "episode.distractors=3"))
    assert estimate(scoring.test(with_distractors, state, None).scores).mean < scores.mean()


def test_distractors_of_no_class_give_the_same_answers_when_embedded_once(tmp_path):
    path = write_csv(tmp_path / "a.csv")
    path.write_text(path.read_text() + "".join(f"strange {n},oos\n" for n in range(40)))
    words = [
        "algo=soft_means", "dataset=text", f"dataset.path={path}", "dataset.distractors=oos",
        "backbone=bag_of_ngrams", "episode.way=2", "episode.query=3", "episode.unlabelled=2",
        "train.steps=0", "test.episodes=8", f"cache_dir={tmp_path}",
    ]  # fmt: skip
    answers = {}
    for number in (0, 3):
        for is_used in ("true", "false"):
            more = [f"episode.distractors={number}", f"engine.features={is_used}"]
            run = build(settings_of(*words, *more))
            confidence = scoring.test(run, run.state, None).confidence
            assert confidence is not None
            answers[number, is_used] = confidence
    for number in (0, 3):
        torch.testing.assert_close(answers[number, "true"], answers[number, "false"])
    assert not torch.allclose(answers[3, "true"], answers[0, "true"])


@pytest.mark.slow
def test_unlabelled_examples_work_from_python(tmp_path):
    overrides = [
        "algo=soft_means",
        "dataset=gaussians",
        "train.steps=2",
        "val.every=2",
        "episode.unlabelled=4",
    ]
    train(
        composition.compose_config([*_SMALL, *overrides]),
        tmp_path / "run",
        "toy",
        overrides,
        Console(quiet=True),
    )
    model = metalearn.load(tmp_path / "run")
    x, more = torch.randn(6, 16), torch.randn(9, 16)
    alone = model.adapt(x, list("aabbcc")).probabilities(more)
    together = model.adapt(x, list("aabbcc"), unlabelled=more).probabilities(more)
    assert not torch.allclose(alone, together)
    evaluate(
        tmp_path / "run",
        ["episode.unlabelled=2", "episode.distractors=1"],
        "test",
        None,
        Console(quiet=True),
    )
    protocols = [
        json.loads(path.read_text())["protocol"]
        for path in (tmp_path / "run/evaluations").glob("*.json")
    ]
    assert {(one["unlabelled"], one["distractors"]) for one in protocols} == {(2, 1)}
    train(
        composition.compose_config([*_SMALL, *overrides[1:4], "algo=protonet"]),
        tmp_path / "plain",
        "p",
        [],
        Console(quiet=True),
    )
    with pytest.raises(UserError, match="does not learn from unlabelled examples"):
        metalearn.load(tmp_path / "plain").adapt(x, list("aabbcc"), unlabelled=more)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "maml",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("fomaml", "anil", "imaml", "reptile")
        ),
    ],
)
def test_gradient_methods_adapt_a_policy(name):
    """A family of control tasks needs no change in a method, the engine or the loop."""
    overrides = [f"algo={name}", "dataset=goals", "train.steps=2", "val.every=2"]
    run = build(settings_of(*overrides))
    assert "head.log_std" in run.state.params and run.metric.name == "return"
    tasks, state = to_float64(run.train.draw(0, 3)), to_float64(run.state)
    progress = torch.zeros((), dtype=torch.float64)
    strategies = (
        ["vmap", "loop"] if run.train_engine.has_own_loss(tasks) else ["vmap", "loop", "mixed"]
    )
    steps = [Engine(run.algorithm, one, 3).step(state, tasks, progress) for one in strategies]
    for step in steps[1:]:
        torch.testing.assert_close(step.gradients, steps[0].gradients, rtol=1e-7, atol=1e-9)
    assert all(value.abs().max() > 0 for value in steps[0].gradients.values())
    scores = [
        Engine(run.algorithm, one, 3).scores(state, tasks) for one in ("vmap", "loop", "mixed")
    ]
    torch.testing.assert_close(scores[1], scores[0])
    torch.testing.assert_close(scores[2], scores[0])


@pytest.mark.slow
def test_adaptation_raises_the_return_of_a_policy(tmp_path):
    overrides = [
        "algo=maml",
        "algo.inner_lr=0.5",
        "algo.step_lrs=[0.5,0.25]",
        "algo.inner_steps=2",
        "dataset=goals",
        "train.steps=60",
        "val.every=30",
    ]
    overrides += [
        "algo.test_inner_steps=2",
        "test.episodes=60",
        "train.meta_batch=10",
        "train.lr=0.003",
    ]
    train(
        composition.compose_config([*_SMALL, *overrides]),
        tmp_path / "run",
        "maml goals",
        overrides,
        Console(quiet=True),
    )
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["test"]["return"]["episodes"] == 60
    evaluate(tmp_path / "run", ["algo.test_inner_steps=0"], "test", None, Console(quiet=True))
    (other,) = (tmp_path / "run/evaluations").glob("*=0.json")
    before, after = json.loads(other.read_text())["test"]["return"], result["test"]["return"]
    assert after["mean"] - after["ci95"] > before["mean"] + before["ci95"]


@pytest.mark.slow
def test_text_works_as_tokens(tmp_path):
    overrides = [
        "algo=protonet",
        "dataset=sentences",
        "train.steps=40",
        "val.every=40",
        "test.episodes=100",
        "episode.query=5",
    ]
    train(
        composition.compose_config([*_SMALL, *overrides]),
        tmp_path / "run",
        "protonet sentences",
        overrides,
        Console(quiet=True),
    )
    accuracy = json.loads((tmp_path / "run/result.json").read_text())["test"]["accuracy"]
    assert accuracy["mean"] > 0.7
    model = metalearn.load(tmp_path / "run")
    assert model.spec.vocabulary == 211
    tokens = torch.randint(1, 200, (4, 8))
    assert model.adapt(tokens, list("abcd")).predict(tokens) == list("abcd")
    with pytest.raises(UserError, match="tokens outside 0 to 210"):
        model.adapt(tokens + 300, list("abcd"))
    for name in ("maml", "rfs"):
        run = build(settings_of(f"algo={name}", "dataset=sentences", "train.batch_size=8"))
        run.train_engine.step(run.state, run.train.draw(0, 2), torch.zeros(()))
    with pytest.raises(UserError, match="takes images, but this dataset has tokens"):
        build(settings_of("algo=protonet", "dataset=sentences", "backbone=conv4"))


@pytest.mark.parametrize("check", testing.BACKBONE_CHECKS)
def test_plugin_backbone_passes_the_backbone_checks(check):
    testing.BACKBONE_CHECKS[check](testing.BackboneCase(Bag(width=4), InputSpec((6,), 20)))


@pytest.mark.slow
def test_plugin_loss_and_augmentation_are_chosen_by_name():
    overrides = [
        "dataset=glyphs",
        "dataset.num_classes=60",
        "dataset.image_size=12",
        "backbone.filters=4",
        "backbone.blocks=2",
    ]
    plain, other, inner = (
        build(settings_of("algo=maml", *overrides, *more))
        for more in (
            [],
            ["loss.name=cubic", "+loss.settings.power=2"],
            ["loss.inner=tests.toys.cubic"],
        )
    )
    tasks: Any = plain.train.draw(0, 2)
    losses = [
        run.train_engine.step(run.state, tasks, torch.zeros(())).logs["loss"]
        for run in (plain, other, inner)
    ]
    assert losses[0] != losses[1] != losses[2] != losses[0]
    darker = build(settings_of("algo=maml", *overrides, "+augment.ops.darken.least=0.1"))
    dark: Any = darker.train.draw(0, 2)
    assert dark.query.x.mean() < 0.8 * tasks.query.x.mean()
    assert torch.equal(darker.test.draw(0, 2).query.x, plain.test.draw(0, 2).query.x)
    for override, line in {
        "loss.name=qubic": "loss.name=qubic: there is no such name; .*did you mean cubic",
        "+loss.settings.power=2": r"loss\.settings\.power: applies to loss\.name",
        "+augment.ops.darcen.least=1": "darcen: there is no such name; .*did you mean darken",
        "+augment.ops.darken.most=1": r"augment\.ops\.darken\.most: darken has no such setting",
        "loss.name=os.system": "there is no such name",
    }.items():
        with pytest.raises(UserError, match=line):
            build(settings_of("algo=maml", *overrides, override))


def test_support_is_a_pytree_with_a_static_way():
    part = Support(torch.zeros(3, 2), torch.zeros(3), 5)
    mapped = torch.func.vmap(lambda item: dataclasses.replace(item, x=item.x + item.way))(part)
    assert mapped.way == 5 and mapped.unlabelled is None
    assert torch.equal(mapped.x, torch.full((3, 2), 5.0))
