"""Every method has a page and docstrings, and the commands of the table of methods are valid."""

import importlib
import inspect
import itertools
import pkgutil
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

import metalearn
from metalearn.config import checking, choices, composition
from metalearn.run.pairings import check
from tests.fixtures import ALGORITHMS

_ROOT = Path(__file__).parent.parent
_TABLES = yaml.safe_load((_ROOT / "benchmarks/methods.yaml").read_text())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_method_has_a_complete_page(name):
    page = (_ROOT / f"docs/algorithms/{name}.md").read_text()
    for part in (
        f"`algo={name}`",
        "```math",
        "**Meta-learned**",
        "**Adapts**",
        "**Cost per task**",
        "**When to use it**",
    ):
        assert part in page, part
    has_reference = any("published" in table["methods"].get(name, {}) for table in _TABLES.values())
    assert has_reference or "**Published**" in page
    assert f"({name}.md)" in (_ROOT / "docs/algorithms/README.md").read_text()


def test_the_front_page_is_short():
    assert len((_ROOT / "README.md").read_text().splitlines()) <= 120


def test_every_dataset_is_in_the_table_with_its_licence():
    page = (_ROOT / "docs/datasets.md").read_text()
    rows = {row.split("`")[1]: row for row in page.splitlines() if row.startswith("| `")}
    assert sorted(rows) == sorted(choices.options("dataset"))
    for name, row in rows.items():
        licence = composition.compose_config([f"dataset={name}"]).dataset.licence
        assert f"| {licence} |".replace("|  |", "| |") in row


def test_public_methods_have_docstrings_of_their_own_or_of_the_method_they_override():
    names = [one.name for one in pkgutil.walk_packages(metalearn.__path__, "metalearn.")]
    assert not [
        f"{module}.{cls.__name__}.{name}"
        for module in names
        if not module.endswith("__main__")
        for cls in vars(importlib.import_module(module)).values()
        if isinstance(cls, type) and cls.__module__ == module and cls.__name__[0] != "_"
        for name, member in vars(cls).items()
        if name[0] != "_" and (inspect.isroutine(member) or isinstance(member, property))
        if not inspect.getdoc(member)
    ]


def test_table_of_methods_is_complete():
    assert sorted(_TABLES["omniglot_5w1s"]["methods"]) == ALGORITHMS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "name"),
    [(table, name) for table, content in _TABLES.items() for name in content["methods"]],
)
def test_commands_of_the_table_of_methods_are_valid(table, name):
    content = _TABLES[table]
    overrides = [
        f"algo={name}",
        *content["settings"],
        *content["methods"][name].get("settings", []),
        "device=cpu",
    ]
    check(checking.check_config(composition.compose_config(overrides)))
    before = itertools.takewhile(lambda other: other != name, content["methods"])
    assert content["methods"][name].get("network", name) in (name, *before)


def test_every_recipe_is_used_by_some_method():
    combinations = [
        {"algo": algo, "dataset": dataset, "backbone": backbone}
        for algo in ALGORITHMS
        for dataset in choices.options("dataset")
        for backbone in choices.options("backbone")
    ]
    used = {name for one in combinations for name in composition.recipe_names(**one)}
    stored = {
        path.stem
        for kind in ("data", "net")
        for path in (_ROOT / "conf/recipe" / kind).glob("*.yaml")
    }
    bases = {
        "gradient-sinusoid",
        "gradient-omniglot",
        "maml_loop-cifar_fs",
    }  # other recipes include them
    assert stored - bases <= used <= stored


def test_recipe_line_names_the_recipes_of_a_run():
    line = composition.recipe_line(
        OmegaConf.create({"algo": "boil", "dataset": "omniglot", "backbone": "conv4"})
    )
    assert line == "recipe: gradient-omniglot, gradient-omniglot-conv4"
    line = composition.recipe_line(
        OmegaConf.create({"algo": "metanet", "dataset": "cifar_fs", "backbone": "mlp"})
    )
    assert line == "recipe: none for metanet on cifar_fs; general settings apply"
    gate = {"experiment": "maml_omniglot_5w1s", "algo": "maml", "dataset": "omniglot"}
    line = composition.recipe_line(OmegaConf.create({**gate, "backbone": "conv4"}))
    assert line == "recipe: maml-omniglot, gradient-omniglot-conv4"
    demo = {"experiment": "demo", "algo": "maml", "dataset": "glyphs", "backbone": "conv4"}
    assert composition.recipe_line(OmegaConf.create(demo)) == "recipe: experiment demo"
