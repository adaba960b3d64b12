"""A user's mistake gives one line: what is wrong, where it was set, what would be right."""

import pytest

from metalearn.cli import train
from metalearn.config import checking, choices, composition, gates, sweeps
from metalearn.run.build import build
from metalearn.run.pairings import check
from metalearn.system.errors import UserError

_CROP = ("augment=crop_flip",)
MISTAKES = [
    (["algo=mamll"], ["algo=mamll", "did you mean maml"]),
    (["dataset=omniglt"], ["dataset=omniglt", "did you mean omniglot"]),
    (["algos=maml"], ["algos", "did you mean algo"]),
    (["algo.inner_lrr=1"], ["algo.inner_lrr", "did you mean algo.inner_lr"]),
    (["+algo.warmup=1"], ["algo.warmup", "there is no such setting"]),
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
        ["loss.name=cross_entropy", "Siamese", "does not use this loss"],
    ),
    (["algo=protonet", "loss.inner=cross_entropy"], ["loss.inner=cross_entropy", "ProtoNet"]),
    (["loss=label_smothing"], ["loss=label_smothing", "did you mean label_smoothing"]),
    (["augment=crop"], ["augment=crop", "did you mean crop_flip"]),
    (["algo=meta_sgd", "algo.step_lrs=[0.1]"], ["algo.step_lrs=[0.1]", "learns its rates"]),
    (["algo.inner_lr=null"], ["algo.inner_lr=None: should be a number"]),
    (["optimiser=null"], ["optimiser=null: there is no such optimiser; there are adam"]),
    (["optimiser.weight_decay=abc"], ["optimiser.weight_decay=abc: should be a number"]),
    (["optimiser.weight_decay=true"], ["optimiser.weight_decay=True: should be a number"]),
    (["optimiser.weight_decay=null"], ["optimiser.weight_decay=None: should be a number"]),
    (["optimiser.betas=3"], ["optimiser.betas=3: should be 2 numbers, like [0.9, 0.999]"]),
    (["optimiser.betas=[0.9]"], ["optimiser.betas=[0.9]: should be 2 numbers"]),
    (["optimiser.betas=[0.9,a]"], ["optimiser.betas=[0.9, 'a']: should be 2 numbers"]),
    (["loss=label_smoothing", "loss.settings.smoothing=abc"], ["smoothing=abc: should be a numb"]),
    (["loss=label_smoothing", "loss.settings.smoothing=2"], ["smoothing=2.0: should be at most 1"]),
    (["loss=label_smoothing", "+loss.settings.y=1"], ["loss.settings.y", "no such setting"]),
    (["+loss.settings.smoothing=1"], ["loss.settings.smoothing: applies to loss.name"]),
    ([*_CROP, "augment.ops.random_crop.padding=abc"], ["padding=abc: should be a whole number"]),
    ([*_CROP, "augment.ops.random_crop.padding=-10"], ["padding=-10: should be at least 0"]),
    (
        [*_CROP, "+augment.ops.random_crop.key=1"],
        ["augment.ops.random_crop.key", "no such setting"],
    ),
    (["loss.name=my_pkg.losses.focal"], ["loss.name=my_pkg.losses.focal", "add plugins=[my_pkg]"]),
    (["+augment.ops={my_pkg.blur:{}}"], ["augment.ops=my_pkg.blur", "add plugins=[my_pkg]"]),
    (["loss.name=os.system"], ["loss.name=os.system: there is no such name"]),
    (
        ["dataset=sinusoid", "backbone=mlp_sinusoid", "episode=regression", "episode.unlabelled=1"],
        ["episode.unlabelled=1: this dataset has no classes"],
    ),
    (
        ["episode.train.distractors=1"],
        ["episode.train.distractors=1", "set episode.train.unlabelled"],
    ),
    (["+train.lr=1"], ["+train.lr: this setting exists; leave out the +"]),
    (["dataset.fractions=[{},0.5,0.5]"], ["dataset.fractions=", "should be a list of numbers"]),
]


#: Every fourth mistake is part of `make check`.
_MISTAKES = [
    pytest.param(*mistake, marks=pytest.mark.slow if number % 4 else ())
    for number, mistake in enumerate(MISTAKES)
]


@pytest.mark.parametrize(("overrides", "parts"), _MISTAKES, ids=lambda value: " ".join(value)[:40])
def test_mistake_is_reported_before_any_data_is_read(overrides, parts, compose):
    with pytest.raises(UserError) as caught:
        check(
            checking.check_config(
                composition.compose_config(overrides)
                if "dataset=sinusoid" in overrides
                else compose(*overrides)
            )
        )
    line = str(caught.value)
    assert "\n" not in line
    assert all(part in line for part in parts), line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["episode.way=200"], ["way=200, but the split has only", "lower episode.way"]),
        (["algo=protonet", "episode.train.way=400"], ["way=400", "lower episode.train.way"]),
        (["dataset.fractions=[0.6,0.2]"], ["dataset.fractions=[0.6, 0.2]", "three fractions"]),
        (["dataset.fractions=[0.1,0.34,0.34]"], ["sum to 1"]),
        (["episode.way=1"], ["way=1", "2 or more"]),
        (["episode.query=20"], ["shot + query = 21", "20 examples", "lower episode.query"]),
        (
            ["dataset=folder", "data_dir=/nowhere"],
            ["dataset.path=pictures", "/nowhere/pictures", "glyphs"],
        ),
        (["dataset.image_size=8", "backbone.downsample=pool"], ["8x8", "fewer blocks"]),
    ],
)
def test_settings_that_the_data_cannot_satisfy_are_reported(overrides, parts, compose):
    with pytest.raises(UserError) as caught:
        build(
            checking.check_config(
                composition.compose_config(overrides)
                if "dataset=folder" in overrides
                else compose(*overrides)
            )
        )
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_missing_device_is_reported(compose, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="device=cuda"):
        check(checking.check_config(compose("device=cuda")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "group",
    [
        "dataset",
        "backbone",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("algo", "experiment")),
    ],
)
def test_every_choice_composes_and_has_an_explanation(group):
    for name, line in choices.options(group).items():
        assert line, f"conf/{group}/{name}.yaml has no comment to explain it"
        if group == "experiment" and name in gates.gates():
            continue  # tests/test_commands.py composes them at every budget
        settings = [f"{group}={name}"]
        if group == "backbone" and name in ("efficientnet_lite0", "timm", "torchvision"):
            settings.append("statistics=population")  # they refuse the query statistics of MAML
            model = {"timm": "test_resnet", "torchvision": "mobilenet_v3_small"}.get(name)
            settings += [f"backbone.model={model}"] if model else []
        check(checking.check_config(composition.compose_config(settings)))


@pytest.mark.slow
def test_optimiser_settings_are_kept_with_train_optimiser():
    for overrides, expected in (
        (["optimiser.momentum=0.9"], {"momentum": 0.9}),
        (["optimiser=sgd", "optimiser.momentum=0.9"], {"momentum": 0.9}),
        (["algo=reptile", "optimiser.momentum=0.9"], {"momentum": 0.9}),
        (["optimiser=adam", "optimiser.weight_decay=0.1"], {"weight_decay": 0.1}),
        (["optimiser=adam"], {"weight_decay": 0.0, "momentum": 0.0}),
    ):
        config = composition.compose_config(["train.optimiser=sgd", *overrides])
        settings = checking.check_config(config)
        assert settings.optimiser["_target_"] == "torch.optim.SGD"
        assert expected.items() <= settings.optimiser.items(), overrides
        assert "betas" not in settings.optimiser


def test_each_value_of_an_axis_is_checked_once():
    runs = sweeps.one_run_per_value(["algo=maml,protonet,anil", "seed=0,1", "val.every=3"])
    assert runs == [
        [f"algo={algo}", f"seed={seed}", "val.every=3"]
        for algo, seed in (("maml", 0), ("protonet", 0), ("anil", 0), ("maml", 1))
    ]
    assert sweeps.one_run_per_value(["algo.inner_lr=interval(0.1,0.5)", "seed=1"]) == [["seed=1"]]


def test_configurations_of_an_axis_equal_composed_ones():
    overrides = [
        "algo=protonet,maml",
        "seed=0,0,3",
        "train.lr=1e-3,0.1",
        "statistics=query,support",
    ]
    for run, config in zip(
        sweeps.one_run_per_value(overrides), sweeps.one_config_per_value(overrides), strict=True
    ):
        assert checking.check_config(config) == checking.check_config(
            composition.compose_config(run)
        )


@pytest.mark.parametrize("value", ["a\nb", "\u202eabc", "\x1b[31m"])
def test_unprintable_characters_are_escaped(value):
    with pytest.raises(UserError) as caught:
        checking.check_config(composition.compose_config([f"train.steps={value}"]))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("arguments", [["seed=1"], ["--cfg", "job"]])
def test_hydra_callbacks_are_refused_and_not_called(arguments, tmp_path):
    called = f"+hydra.callbacks.x={{_target_: os.mkdir, path: {tmp_path / 'called'}}}"
    with pytest.raises(UserError, match=r"hydra\.callbacks\.x"):
        train.main(["algo=protonet", "dataset=glyphs", *arguments, called])
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("word", ["hydra.launcher._target_=os.system", "hydra.sweeper=os"])
def test_only_hydras_plugins_launch_and_sweep(word):
    with pytest.raises(UserError, match=r"should be one of Hydra's plugins"):
        train.main(["-m", "algo=maml,protonet", "dataset=glyphs", word])
