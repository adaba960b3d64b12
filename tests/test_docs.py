"""Every method has its page, and the table of methods names settings that exist."""

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from metalearn.config import checking, composition
from metalearn.run.build import check
from tests.conftest import ALGORITHMS

_ROOT = Path(__file__).parent.parent
_TABLES = yaml.safe_load((_ROOT / "benchmarks/methods.yaml").read_text())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_method_has_its_page(name):
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
    published = any("published" in wanted["methods"].get(name, {}) for wanted in _TABLES.values())
    assert published or "**Published**" in page
    assert f"({name}.md)" in (_ROOT / "docs/algorithms/README.md").read_text()


def test_the_table_of_methods_is_complete():
    assert sorted(_TABLES["omniglot_5w1s"]["methods"]) == ALGORITHMS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "name"),
    [(table, name) for table, wanted in _TABLES.items() for name in wanted["methods"]],
)
def test_commands_of_the_table_of_methods_are_valid(table, name):
    wanted = _TABLES[table]
    words = [
        f"algo={name}",
        *wanted["settings"],
        *wanted["methods"][name]["settings"],
        "device=cpu",
    ]
    check(checking.checked(composition.composed(words)))


def test_every_recipe_is_used_by_a_method():
    choices = [
        {"algo": algo, "dataset": dataset, "backbone": backbone}
        for algo in ALGORITHMS
        for dataset in composition.options("dataset")
        for backbone in composition.options("backbone")
    ]
    used = {name for one in choices for name in composition.recipe_names(**one)}
    stored = {
        path.stem
        for kind in ("data", "net")
        for path in (_ROOT / "conf/recipe" / kind).glob("*.yaml")
    }
    bases = {
        "gradient-sinusoid",
        "gradient-omniglot",
    }  # what other recipes start from, and perhaps methods to come
    assert stored - bases <= used <= stored


def test_the_recipe_of_a_run_is_named():
    line = composition.recipe_line(
        OmegaConf.create({"algo": "boil", "dataset": "omniglot", "backbone": "conv4"})
    )
    assert line == "recipe: gradient-omniglot, gradient-omniglot-conv4"
    line = composition.recipe_line(
        OmegaConf.create({"algo": "metanet", "dataset": "cifar_fs", "backbone": "mlp"})
    )
    assert line == "recipe: none for metanet on cifar_fs; general settings apply"
