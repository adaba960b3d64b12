"""Paths and numbers as a user types them."""

import os
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from metalearn.cli import _arguments
from metalearn.config import checking, composition, paths
from metalearn.system.errors import UserError

_HARD = "\\'\"a,=[]{}() \n~$%@#&;|<>*?!é\udcff"
_ANY = st.characters(blacklist_characters="\0", blacklist_categories=())
_TINY = [
    "algo=protonet", "dataset=folder", "dataset.image_size=8", "backbone.filters=4",
    "backbone.halvings=2", "episode.way=2", "episode.query=1", "train.steps=1", "val.episodes=2",
    "test.episodes=2", "logger=none",
]  # fmt: skip
_NAMES = ["jörg", "pics (1)", "a=b", "a{b}", "[x]", "x@y#z", "pics'x", 'a"b', "a,b", "a\\", "日 本"]


def value_of(word):
    value = OverridesParser.create().parse_override(word).value()
    return getattr(value, "text", value)


@given(st.text(_ANY, min_size=1, max_size=12) | st.text(_HARD, min_size=1, max_size=12))
def test_hydra_reads_every_path_as_it_is(path):
    is_quoted = len(path) > 1 and path[0] == path[-1] and path[0] in "'\""
    if path == "null" or "${" in path or is_quoted:
        return
    assert value_of(paths.literal(f"dataset.path={path}", False)) == os.path.expanduser(path)


def test_values_with_a_meaning_of_their_own_stay():
    for word in ("data_dir=null", "data_dir=${oc.env:HOME}/x", "data_dir='a b'", "algo=maml"):
        assert paths.literal(word, False) == word
    assert paths.literal("dataset.path=a b,~/c", True) == f"dataset.path='a b','{Path.home()}/c'"
    assert paths.literal("dataset.path=glob(*)", True) == "dataset.path=glob(*)"
    assert paths.literal("dataset.path=glob(*)", False) == "dataset.path='glob(*)'"


def test_other_values_that_cannot_be_read_are_named():
    with pytest.raises(UserError, match=r"logger.project=a\(b: cannot be read; quote such a value"):
        composition.compose_config(["logger.project=a(b"])


def letters(folder):
    """Make ten classes of two images."""
    for number in range(10):
        (folder / f"class{number}").mkdir(parents=True)
        for index in range(2):
            image = Image.new("RGB", (8, 8), (20 * number, 60 * index, 9 * number))
            image.save(folder / f"class{number}" / f"{index}.png")
    return folder


def run(words):
    """Train in this process. Return the stored configuration."""
    from metalearn.cli import train

    train.main(words)
    folder = next(value_of(paths.literal(word, False)) for word in words if "run.dir=" in word)
    return OmegaConf.load(Path(folder).expanduser() / "config.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*_NAMES, "\udcffbad", "./here"])
def test_folders_of_any_name_can_be_trained_on(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    letters(tmp_path / name)
    more = [f"dataset.path={name}", f"hydra.run.dir=out/{name}", f"cache_dir={name}-cache"]
    config = run([*_TINY, *more])
    assert config.dataset.path == str(tmp_path / name)
    assert next((tmp_path / f"{name}-cache").iterdir()).suffix == ".pt"


@pytest.mark.slow
def test_dataset_path_is_searched_here_then_in_the_data_directory(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    data = letters(tmp_path / "data" / "letters")
    words = [*_TINY, "dataset.path=letters", f"data_dir={tmp_path}/data"]
    config = run([*words, "hydra.run.dir=one"])
    assert config.dataset.path == str(data)
    here = letters(tmp_path / "here" / "letters")
    config = run([*words, "hydra.run.dir=two"])
    assert config.dataset.path == str(here)
    with pytest.raises(UserError) as raised:
        run([*_TINY, "dataset.path=nowhere", f"data_dir={tmp_path}/data", "hydra.run.dir=three"])
    assert f"no folder or zip at {tmp_path}/here/nowhere or {tmp_path}/data/nowhere" in str(
        raised.value
    )
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    config = run([*_TINY, "dataset.path=~/letters", "hydra.run.dir=~/four"])
    assert config.dataset.path == str(here)


def test_whole_numbers_may_be_written_as_floats():
    words = ["train.steps=1e3", "backbone.filters=3.2e1", "train.clip_norm=1e1"]
    settings = checking.check_config(composition.compose_config(words))
    assert (settings.train.steps, settings.backbone["filters"]) == (1000, 32)
    assert isinstance(settings.train.steps, int)
    with pytest.raises(UserError, match=r"train.steps=0.5: should be a whole number"):
        checking.check_config(composition.compose_config(["train.steps=0.5"]))


def test_arguments_quote_paths_after_all_options_are_known():
    words = _arguments.parse(["dataset.path=a,b", "-m"]).overrides
    assert words == ["dataset.path='a','b'"]
    assert _arguments.parse(["dataset.path=a,b"]).overrides == ["dataset.path='a,b'"]
