"""Every setting is in the torch-free index, has a role, and has a value in conf/."""

import subprocess
import sys
from pathlib import Path

import pytest
import settings_index
import yaml
from omegaconf import OmegaConf

from metalearn.config import checking, choices, components, composition, fields, roles, schema
from metalearn.system.errors import UserError

_CONF = Path(components.conf_dir())


def plain(*overrides):
    content = OmegaConf.to_container(composition.compose_config(list(overrides)), resolve=True)
    assert isinstance(content, dict)
    return checking.complete({str(key): value for key, value in content.items()})


def test_index_matches_the_classes():
    assert components.INDEX_FILE.read_text() == settings_index.text(), (
        "run: python scripts/settings_index.py"
    )


def test_mistyped_name_is_reported_without_importing_torch():
    mistakes = {
        "algo.inner_lrr=1": "did you mean algo.inner_lr",
        "train.steps=x": "a whole number",
        "algo.inner_lr=-1": "greater than 0",
        "backbone.downsample=strides": "did you mean stride",
        "dataset.split=alphabets": "did you mean alphabet",
        "loss.name=label_smothing": "did you mean label_smoothing",
        "loss.inner=squared_eror": "did you mean squared_error",
        "+augment.ops.random_crp.padding=1": "did you mean random_crop",
        "+augment.mix.mixp.alpha=1": "did you mean mixup",
        "optimiser._target_=torch.optim.AdmW": "did you mean torch.optim.Adam",
    }
    code = (
        "import sys; from metalearn.cli import _arguments, _launch\n"
        "for word in sys.argv[1:]:\n"
        " try:\n  _launch.check(_arguments.parse([word]))\n"
        " except Exception as error:\n  print(type(error).__name__, error)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *mistakes], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines.pop() == "False", "torch was imported"
    for line, expected in zip(lines, mistakes.values(), strict=True):
        assert line.startswith("UserError") and expected in line


@pytest.mark.slow
def test_every_setting_has_a_role_and_a_value_in_yaml():
    for group in schema.COMPONENTS:
        for name in choices.options(group):
            node = composition.compose_config([f"{group}={name}"])[group]
            declared = {setting.name for setting in components.component_settings(node, group)}
            assert declared <= set(node) - {"_target_"}, f"conf/{group}/{name}.yaml"
    complete = plain("experiment=maml_omniglot_5w1s")
    base = yaml.safe_load((_CONF / "base.yaml").read_text())
    for part in ("train", "val", "test", "checkpoint", "engine"):
        assert base[part].keys() == complete[part].keys()
    for name, setting in roles.roles(complete).items():
        own = setting.rule["role"].split()
        assert own and set(own) <= set(fields.ROLES), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "resume", "evaluate", "reproduce", "methods"),
    [
        # May a resumed run, a test or a reproduction have a different value? Are runs with
        # different values different methods?
        ("train.steps", False, False, False, True),
        ("train.log_every", True, False, True, False),
        ("train.nonfinite", True, True, True, False),
        ("algo.inner_lr", False, True, False, True),
        ("algo.inner_steps", False, False, False, True),
        ("algo.test_inner_steps", False, True, False, True),
        ("algo._target_", False, False, False, True),
        ("backbone.filters", False, False, False, True),
        ("dataset.rotations", False, True, False, True),
        ("episode.shot", False, True, False, True),
        ("episode.unlabelled", False, True, False, True),
        ("episode.train.shot", False, False, False, True),
        ("episode_seed", False, True, False, True),
        ("seed", False, False, True, False),
        ("budget", False, False, False, True),
        ("statistics", False, True, False, True),
        ("test.episodes", False, True, False, False),
        ("val.every", False, False, False, True),
        ("optimiser.weight_decay", False, False, False, True),
        ("loss.name", False, False, False, True),
        ("augment.ops.random_crop.padding", False, False, False, True),
        ("augment.support.random_crop.padding", False, True, False, True),
        ("engine.task_chunk", True, True, True, False),
        ("engine.threads", False, True, True, False),
        ("engine", False, True, True, False),
        ("device", False, True, True, False),
        ("data_dir", True, True, True, False),
        ("checkpoint.every", True, True, True, False),
        ("logger.wandb.project", True, False, True, False),
        ("logger", True, False, True, False),
        ("resume", True, False, True, False),
        ("nothing.like.it", False, False, False, True),
    ],
)
def test_roles_decide_what_commands_may_change(key, resume, evaluate, reproduce, methods):
    described = roles.roles(plain("algo=maml", "augment=crop_flip"))
    assert roles.may_resume_with(key, described) is resume
    assert roles.may_evaluate_with(key, described) is evaluate
    assert roles.may_reproduce_with(key, described) is reproduce
    assert roles.distinguishes_methods(key, described) is methods


def test_optimisers_are_listed_without_torch_as_torch_has_them():
    import torch

    known = {
        f"torch.optim.{name}"
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type)
        and issubclass(cls, torch.optim.Optimizer)
        and cls is not torch.optim.Optimizer
    }
    assert set(checking.optimiser_names()) == known


def test_recipe_chooses_groups_and_the_command_line_replaces_them():
    config = composition.compose_config(["algo=rfs", "dataset=cifar_fs"])
    assert config.optimiser.weight_decay == 5e-4 and "colour_jitter" in config.augment.ops
    words = ["algo=rfs", "dataset=cifar_fs", "optimiser=adamw", "augment=none"]
    config = composition.compose_config(words)
    assert config.optimiser._target_ == "torch.optim.AdamW" and not config.augment.ops
    config = composition.compose_config(["algo=baseline", "dataset=cifar_fs"])
    assert config.optimiser._target_ == "torch.optim.Adam" and not config.augment.ops


def test_value_by_budget_or_way_and_the_command_line_replaces_it():
    words = ["algo=maml", "dataset=omniglot"]
    assert plain(*words)["train"]["steps"] == plain(*words, "budget=day")["train"]["steps"] == 30000
    steps = [plain(*words, f"budget={one}")["train"]["steps"] for one in ("smoke", "quick")]
    assert steps == [60, 1500]
    twenty = plain(*words, "episode=20w1s", "train.steps=7")
    assert (twenty["algo"]["inner_lr"], twenty["algo"]["inner_loss"]) == (0.1, "sum")
    assert twenty["train"]["steps"] == 7
    authors = plain(*words, "episode=5w5s", "budget=paper")
    assert (authors["episode"]["train"]["query"], authors["train"]["meta_batch"]) == (5, 32)
    for word, message in {
        "budget=paper": "budget=paper: this method's recipe for this dataset has smoke, quick, day",
        "budget=huge": "budget=huge: this method's recipe for this dataset has smoke, quick, day",
    }.items():
        with pytest.raises(UserError, match=message):
            checking.check_config(composition.compose_config(["algo=maml", "dataset=glyphs", word]))


def test_recipe_chooses_a_backbone_and_its_settings():
    words = ["algo=r2d2", "dataset=cifar_fs"]
    assert plain(*words)["backbone"]["filters"] == [64, 64, 64, 64]
    assert plain(*words, "backbone=mlp")["backbone"]["_target_"].endswith("MLP")
    assert plain(*words, "backbone=conv4")["backbone"]["filters"] == 64
    assert plain("algo=r2d2", "dataset=omniglot")["backbone"]["_target_"].endswith("Conv4")
    assert plain("algo=maml", "dataset=sinusoid")["backbone"]["hidden"] == [40, 40]


def test_target_must_be_in_the_package_or_in_a_plugin():
    for target, line in {
        "os.system": "should name a class in metalearn.algorithms",
        "torch.nn.Linear": r"torch is not a plugin of this installation; .* add plugins=\[torch\]",
        "metalearn.algorithms.nowhere.X": "there is no such class",
        "metalearn.build.Run": "should name a class in metalearn.algorithms",
        "a b": "should name a class",
    }.items():
        with pytest.raises(UserError, match=line):
            components.component_settings({"_target_": target}, "algo")
