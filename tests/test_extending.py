"""The example of docs/extending.md, run as it stands there."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console

import metalearn
from metalearn import composition, config, loop
from metalearn.build import build
from metalearn.engine import Engine
from metalearn.verbs.compare import compare
from metalearn.verbs.evaluate import evaluate
from metalearn.verbs.train import train
from tests.conftest import SMALL, doubled

_PAGE = (Path(__file__).parent.parent / "docs/extending.md").read_text()


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The module and the YAML of the page, in place for one test; returns how many lines they have."""
    code, yaml = (re.search(rf"```{kind}\n(.*?)```", _PAGE, re.S)[1] for kind in ("python", "yaml"))
    name = re.search(r"_target_: ([\w.]+)\.\w+", yaml)[1]
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(code, name, "exec"), module.__dict__)
    (tmp_path / "algo").mkdir()
    (tmp_path / "algo" / f"{name.rpartition('.')[2]}.yaml").write_text(yaml)
    return code.count("\n") + yaml.count("\n")


def test_the_example_is_short_and_trains(example, tmp_path, cache_dir):
    assert example < 60
    words = [*SMALL, "algo=neighbour", f"cache_dir={cache_dir}", f"hydra.searchpath=[file://{tmp_path}]"]
    run = build(config.checked(composition.composed([*words, "train.steps=3", "val.every=3", "train.meta_batch=3"])))
    tasks, state = doubled(run.train.draw(0, 3)), doubled(run.state)
    half = torch.tensor(0.5).double()
    steps = [Engine(run.algorithm, strategy, 3).step(state, tasks, half).gradients for strategy in ("vmap", "loop")]
    torch.testing.assert_close(*steps, rtol=1e-7, atol=1e-9)
    assert all(value.abs().max() > 0 for value in steps[0].values())
    before = {name: value.clone() for name, value in run.state.meta.items()}
    loop.fit(run, loop.Silent(), tmp_path)
    assert not any(torch.equal(before[name], value) for name, value in run.state.meta.items())


@pytest.mark.slow
def test_every_verb_knows_the_example(example, tmp_path, cache_dir):
    words = [*SMALL, "algo=neighbour", f"cache_dir={cache_dir}"]
    composed = composition.composed([*words, f"hydra.searchpath=[file://{tmp_path}]"])
    console, folders = Console(record=True, width=160), [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        train(OmegaConf.merge(composed, {"seed": seed}), folder, "neighbour glyphs", words, console)
    evaluate(folders[0], ["episode.shot=2"], "test", None, console)
    compare(folders, tmp_path / "compared", console)
    assert "neighbour glyphs" in (tmp_path / "compared/comparison.md").read_text()
    model = metalearn.load(folders[0])
    pictures = torch.rand(4, *model.spec.input_shape)
    model.adapt(pictures, ["x", "y", "x", "y"])
    assert model.predict(pictures) == ["x", "y", "x", "y"]
