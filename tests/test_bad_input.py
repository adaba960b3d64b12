"""A user's mistake: one line that says what, where, and what would be right."""

import contextlib

import pytest

from metalearn.cli import train
from metalearn.config import checking, components, composition
from metalearn.run.build import build
from metalearn.run.pairings import check
from metalearn.system.errors import UserError

MISTAKES = [
    (["algo=mamll"], ["algo=mamll", "did you mean maml"]),
    (["dataset=omniglt"], ["dataset=omniglt", "did you mean omniglot"]),
    (["algos=maml"], ["algos", "did you mean algo"]),
    (["algo.inner_lrr=1"], ["algo.inner_lrr", "did you mean algo.inner_lr"]),
    (["+algo.warmup=1"], ["algo.warmup", "nothing reads"]),
    (["+train.step=1"], ["train.step", "did you mean train.steps"]),
    (["train.steps=many"], ["train.steps=many", "a whole number"]),
    (["train.steps=1.5"], ["train.steps=1.5", "a whole number"]),
    (["train.lr=fast"], ["train.lr=fast", "a number"]),
    (["dataset.rotations=???"], ["dataset.rotations", "no value"]),
    (
        ["dataset._target_=metalearn.build.Run"],
        ["dataset._target_=metalearn.build.Run", "metalearn.data"],
    ),
    (["train.lr=nan"], ["train.lr=nan", "a number"]),
    (["algo.first_order=perhaps"], ["algo.first_order=perhaps", "true or false"]),
    (["train.steps=-1"], ["train.steps=-1", "at least 0"]),
    (["train.meta_batch=0"], ["train.meta_batch=0", "at least 1"]),
    (["episode.way=0"], ["episode.way=0", "at least 1"]),
    (["episode.train.shot=0"], ["episode.train.shot=0", "at least 1"]),
    (["test.episodes=1"], ["test.episodes=1", "at least 2"]),
    (["val.every=0"], ["val.every=0", "at least 1"]),
    (["train.lr=0"], ["train.lr=0", "greater than 0"]),
    (["seed=99999999999"], ["seed=99999999999", "too large"]),
    (["statistics=batch"], ["statistics=batch", "query, support"]),
    (["backbone.downsample=strides"], ["backbone.downsample=strides", "did you mean stride"]),
    (["algo.inner_loss=median"], ["algo.inner_loss=median", "mean, sum"]),
    (["algo=protonet", "dataset=sinusoid"], ["ProtoNet", "regression"]),
    (["episode.train.way=20"], ["episode.train.way=20", "episode.way=5", "MAML"]),
    (["statistics=population", "backbone.normalisation=none"], ["population", "normalisation"]),
    (["algo._target_=os.system"], ["algo._target_=os.system", "metalearn.algorithms"]),
    (
        ["algo._target_=metalearn.cli.main"],
        ["algo._target_=metalearn.cli.main", "metalearn.algorithms"],
    ),
    (["algo._target_=metalearn.algorithms.nowhere.X"], ["no such class"]),
    (["train.lr=${nowhere}"], ["nowhere"]),
    (["train.lr=[1"], ["train.lr=[1"]),
    (["algo=null"], ["algo"]),
    (["train=null"], ["train"]),
    (["dataset.fractions=[0.5,a,0.2]"], ["dataset.fractions", "a number"]),
    (["train.source=batches"], ["train.source=batches", "MAML trains on episodes"]),
    (
        ["algo=siamese", "loss.name=cross_entropy"],
        ["loss.name=cross_entropy", "Siamese", "of its own"],
    ),
    (["algo=protonet", "loss.inner=cross_entropy"], ["loss.inner=cross_entropy", "ProtoNet"]),
    (["loss=label_smothing"], ["loss=label_smothing", "did you mean label_smoothing"]),
    (["augment=crop"], ["augment=crop", "did you mean crop_flip"]),
    (["algo=meta_sgd", "algo.step_lrs=[0.1]"], ["algo.step_lrs=[0.1]", "learns its rates"]),
]


@pytest.mark.parametrize(("overrides", "words"), MISTAKES, ids=lambda value: " ".join(value)[:40])
def test_mistake_is_named_before_any_data_is_read(overrides, words, compose):
    with pytest.raises(UserError) as caught:
        check(
            checking.checked(
                composition.composed(overrides)
                if "dataset=sinusoid" in overrides
                else compose(*overrides)
            )
        )
    line = str(caught.value)
    assert "\n" not in line
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["episode.way=200"], ["way=200", "classes of the split"]),
        (["algo=protonet", "episode.train.way=400"], ["train episodes", "way=400"]),
        (["dataset.fractions=[0.6,0.2]"], ["dataset.fractions=[0.6, 0.2]", "three fractions"]),
        (["dataset.fractions=[0.1,0.34,0.34]"], ["sum to 1"]),
        (["episode.way=1"], ["way=1", "2 or more"]),
        (["episode.query=20"], ["1 + 20", "20 examples"]),
        (
            ["dataset=folder", "data_dir=/nowhere"],
            ["dataset.path=pictures", "/nowhere/pictures", "glyphs"],
        ),
        (["dataset.image_size=8", "backbone.downsample=pool"], ["8x8", "fewer blocks"]),
    ],
)
def test_what_the_data_cannot_give_is_named(overrides, words, compose):
    with pytest.raises(UserError) as caught:
        build(
            checking.checked(
                composition.composed(overrides)
                if "dataset=folder" in overrides
                else compose(*overrides)
            )
        )
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_device_that_is_not_there_is_named(compose, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="device=cuda"):
        check(checking.checked(compose("device=cuda")))


@pytest.mark.parametrize(
    "group",
    [
        "dataset",
        "backbone",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("algo", "experiment")),
    ],
)
def test_every_choice_composes_and_is_explained(group):
    for name, line in composition.options(group).items():
        settings = [f"{group}={name}"]
        check(checking.checked(composition.composed(settings)))
        assert line, f"conf/{group}/{name}.yaml has no comment to explain it"


@pytest.mark.slow
def test_methods_compose_with_the_datasets_they_can_learn_and_have_a_recipe_for():
    for algo in composition.options("algo"):
        for dataset in ("sinusoid", "omniglot", "cifar_fs"):
            if not composition.recipe_names(algo, dataset, "conv4") and dataset != "sinusoid":
                continue
            settings = checking.checked(composition.composed([f"algo={algo}", f"dataset={dataset}"]))
            target = components.component(settings.dataset, "dataset").target
            possible = target in components.component(settings.algo, "algo").targets
            with (
                contextlib.nullcontext()
                if possible
                else pytest.raises(UserError, match="regression")
            ):
                check(settings)


def test_each_value_of_an_axis_is_checked_once():
    runs = composition.one_run_per_value(["algo=maml,protonet,anil", "seed=0,1", "val.every=3"])
    assert runs == [
        [f"algo={algo}", f"seed={seed}", "val.every=3"]
        for algo, seed in (("maml", 0), ("protonet", 0), ("anil", 0), ("maml", 1))
    ]
    assert composition.one_run_per_value(["algo.inner_lr=interval(0.1,0.5)", "seed=1"]) == [
        ["seed=1"]
    ]


@pytest.mark.parametrize("value", ["a\nb", "\u202eabc", "\x1b[31m"])
def test_what_would_break_a_line_is_escaped(value):
    with pytest.raises(UserError) as caught:
        checking.checked(composition.composed([f"train.steps={value}"]))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("words", [["seed=1"], ["--cfg", "job"]])
def test_callbacks_of_hydra_call_nothing(words, tmp_path):
    called = f"+hydra.callbacks.x={{_target_: os.mkdir, path: {tmp_path / 'called'}}}"
    with pytest.raises(UserError, match=r"hydra\.callbacks\.x"):
        train.main(["algo=protonet", "dataset=glyphs", *words, called])
    assert not (tmp_path / "called").exists()
