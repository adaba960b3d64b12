"""The commands evaluate, compare and reproduce on finished runs."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from metalearn.cli import reproduce
from metalearn.cli.compare import compare
from metalearn.config import checking, choices, components, composition, gates, schema
from metalearn.report.result import Result
from metalearn.report.scores import read_scores
from metalearn.report.stats import estimate, paired_difference
from metalearn.run.evaluate import evaluate
from metalearn.run.train import train
from metalearn.system.errors import RunFailed, UserError
from metalearn.tasks.sampling import SAMPLER_VERSION
from metalearn.tasks.store import ClassIndex, ClassView
from metalearn.tasks.types import Estimate


@pytest.fixture
def console():
    return Console(width=160, record=True)


@pytest.fixture(scope="module")
def trained():
    """Folders of the runs that tests have trained, by their overrides."""
    return {}


@pytest.fixture
def run(compose, console, tmp_path, tmp_path_factory, trained):
    """Return a function that makes a run in a folder of this name; training is deterministic."""

    def make(name, *overrides):
        if overrides not in trained:
            composed = compose(*overrides)
            algorithm = checking.check_config(composed).algo["_target_"].rpartition(".")[2].lower()
            folder = tmp_path_factory.mktemp("trained") / "run"
            train(composed, folder, f"{algorithm} glyphs", list(overrides), console)
            trained[overrides] = folder
        return shutil.copytree(trained[overrides], tmp_path / name)

    return make


def only_evaluation(folder, **protocol):
    """Return the only evaluation with these values in its protocol."""
    evaluations = [
        json.loads(path.read_text()) for path in sorted((folder / "evaluations").glob("*.json"))
    ]
    (match,) = [
        one
        for one in evaluations
        if all(one["protocol"][key] == value for key, value in protocol.items())
    ]
    return match


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "inductive"),
    [pytest.param("maml", "support", marks=pytest.mark.slow), ("protonet", "population")],
)
def test_evaluate_gives_both_statistics_on_shared_episodes(run, console, name, inductive):
    folder = run("a", f"algo={name}", "test.episodes=20")
    result = json.loads((folder / "result.json").read_text())
    evaluate(folder, [], "test", None, console)
    query = only_evaluation(folder, statistics="query")
    other = only_evaluation(folder, statistics=inductive)
    assert result["test"] in (query["test"], other["test"])
    scores = [
        read_scores(folder / "evaluations" / f"{one['protocol_id']}_scores.csv")
        for one in (query, other)
    ]
    difference = paired_difference(*scores)
    for one in (query, other):
        stored = one["transductive_minus_inductive"]
        assert stored["mean"] == pytest.approx(difference.mean, abs=1e-5)
        assert stored["ci95"] == pytest.approx(difference.ci95, abs=1e-5)
        assert stored["p_value"] == pytest.approx(difference.p_value, rel=1e-2)
    assert "transductive minus inductive" in console.export_text()
    # The episodes are the same, so the mean difference is the difference of the means.
    assert difference.mean == pytest.approx(
        query["test"]["accuracy"]["mean"] - other["test"]["accuracy"]["mean"], abs=1e-5
    )


@pytest.mark.slow
def test_evaluate_without_normalisation_has_one_measurement(run, console):
    folder = run("a", "algo=maml", "backbone.normalisation=none")
    evaluate(folder, [], "test", None, console)
    assert "transductive_minus_inductive" not in only_evaluation(folder, statistics="none")


@pytest.mark.slow
def test_evaluate_changes_only_the_protocol(run, console):
    folder = run("a", "algo=protonet")
    evaluate(
        folder,
        ["episode=20w1s", "episode.way=7", "episode.shot=2", "episode.query=4", "test.episodes=9"],
        "test",
        None,
        console,
    )
    evaluation = only_evaluation(folder, statistics="population")
    assert [evaluation["protocol"][key] for key in ("way", "shot", "query")] == [7, 2, 4]
    assert evaluation["test"]["accuracy"]["episodes"] == 9
    evaluate(
        folder,
        ["dataset=glyphs", "dataset.num_classes=50", "dataset.jitter=1", "dataset.image_size=16"],
        "test",
        None,
        console,
    )
    evaluate(folder, [], "train", None, console)
    evaluations = [json.loads(path.read_text()) for path in (folder / "evaluations").glob("*.json")]
    assert {one["split"] for one in evaluations} == {"train", "test"}
    assert len({one["protocol_id"] for one in evaluations}) == 6

    for overrides, message in [
        (["train.steps=5"], "cannot change how the run was trained"),
        (["episode.train.way=3"], "cannot change how the run was trained"),
        (["episode.qery=5"], "there is no such key; did you mean episode.query"),
        (["statistics=median"], "should be one of query"),
    ]:
        with pytest.raises(UserError, match=message):
            evaluate(folder, overrides, "test", None, console)
    with pytest.raises(UserError, match="split=dev: should be one of"):
        evaluate(folder, [], "dev", None, console)
    with pytest.raises(UserError, match="ProtoNet does not adapt in steps"):
        evaluate(folder, [], "test", "steps", console)


@pytest.mark.slow
def test_evaluate_reads_a_run_older_than_a_setting(run, console):
    folder = run("a", "algo=maml")
    lines = (folder / "config.yaml").read_text().splitlines()
    newer = (
        "budget:",
        "  pull:",
        "  halvings:",
        "  cuda_graph:",
    )  # settings of the run, its method, its backbone and its engine
    older = [line for line in lines if not line.startswith(newer)]
    assert len(older) == len(lines) - len(newer)
    (folder / "config.yaml").write_text("\n".join(older))
    (folder / "engine.json").unlink()
    evaluate(folder, [], "test", None, console)
    (folder / "config.yaml").write_text("\n".join([*lines, "gone: 1"]))
    with pytest.raises(UserError, match=r"a/config\.yaml: gone: there is no such setting"):
        evaluate(folder, [], "test", None, console)


@pytest.mark.slow
def test_evaluation_file_names_a_different_precision(run, console):
    folder = run("a", "algo=protonet")
    evaluate(folder, ["engine.precision=bf16"], "test", None, console)
    assert all("-precision=bf16" in path.name for path in (folder / "evaluations").glob("*.json"))


@pytest.mark.slow
def test_different_adaptation_never_replaces_the_plain_evaluation(run, console):
    folder = run("a", "algo=maml")
    evaluate(folder, [], "test", None, console)
    before = {path.name: path.read_text() for path in (folder / "evaluations").glob("*.json")}
    evaluate(folder, ["++algo.test_inner_steps=9", "algo.inner_lr=0.1"], "test", None, console)
    after = {path.name: path.read_text() for path in (folder / "evaluations").glob("*.json")}
    assert {name: after[name] for name in before} == before
    added = sorted(after.keys() - before.keys())
    assert [name.partition("-")[2] for name in added] == [
        "inner_lr=0.1-test_inner_steps=9.json"
    ] * 2
    evaluate(
        folder, ["algo.test_inner_steps=3"], "test", None, console
    )  # the run's own value, so the same adaptation
    assert len(list((folder / "evaluations").glob("*.json"))) == 4
    with pytest.raises(
        UserError, match=r"only training reads this; did you mean algo\.test_inner_steps"
    ):
        evaluate(folder, ["algo.inner_steps=7"], "test", None, console)
    with pytest.raises(RunFailed, match="not finite"):
        evaluate(folder, ["algo.inner_lr=3e38"], "test", None, console)


@pytest.mark.slow
def test_evaluate_refuses_training_classes_under_other_dataset_settings(run, console):
    folder = run("a", "algo=protonet")
    for overrides in (["dataset.split_seed=5"], ["dataset.split_seed=5", "dataset.jitter=1.01"]):
        with pytest.raises(UserError, match="were trained or validated on"):
            evaluate(folder, overrides, "test", None, console)
    # Allowed, because `split` selects these classes.
    evaluate(folder, ["dataset.rotations=classes"], "train", None, console)
    assert "train accuracy" in console.export_text()


@pytest.mark.slow
def test_evaluate_refuses_another_way_if_it_is_part_of_the_weights(run, console):
    folder = run("a", "algo=maml")
    with pytest.raises(UserError, match=r"episode\.way=7: the run distinguishes 5 classes"):
        evaluate(folder, ["episode.way=7"], "test", None, console)


@pytest.mark.slow
def test_curve_over_steps_ends_at_non_finite_predictions(console, tmp_path):
    overrides = [
        "algo=maml",
        "dataset=sinusoid",
        "algo.inner_lr=1e3",
        "algo.test_inner_steps=0",
        "train.steps=0",
    ]
    small = ["val.episodes=4", "test.episodes=4", "logger=none"]
    train(
        composition.compose_config([*overrides, *small]),
        tmp_path / "wild",
        "wild",
        overrides,
        console,
    )
    evaluate(tmp_path / "wild", [], "test", "steps", console)
    rows = (
        next((tmp_path / "wild/evaluations").glob("*_steps_curve.csv")).read_text().splitlines()[1:]
    )
    assert 1 <= len(rows) < 11
    assert "are not finite; the curve ends here" in console.export_text()


@pytest.mark.slow
def test_curves_contain_the_result_of_the_run(run, console):
    folder = run("a", "algo=maml")
    result = json.loads((folder / "result.json").read_text())
    for curve in ("steps", "shot"):
        evaluate(folder, [], "test", curve, console)
        stem = folder / "evaluations" / f"{result['protocol_id']}_{curve}_curve"
        assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        rows = list(csv.DictReader(stem.with_suffix(".csv").open()))
        values = [int(row[curve]) for row in rows]
        # Of the 20 images per class, 3 are queries.
        assert values == (list(range(11)) if curve == "steps" else [1, 2, 3, 4, 5, 7, 10, 15])
        own = rows[
            values.index(3 if curve == "steps" else 1)
        ]  # three inner steps, one shot: as in the test of the run
        assert float(own["mean"]) == pytest.approx(result["test"]["accuracy"]["mean"], abs=1e-5)
        assert own["protocol_id"] == result["protocol_id"]


@pytest.mark.slow
def test_curve_over_given_ways_and_shots(run, console):
    folder = run("a", "algo=protonet")

    def measured(curve, points=None):
        evaluate(folder, [], "test", curve, console, points)
        (file,) = (folder / "evaluations").glob(f"*_{curve}_curve.csv")
        rows = list(csv.DictReader(file.open()))
        return {int(row[curve]): row["protocol_id"] for row in rows}

    own = json.loads((folder / "result.json").read_text())
    ways, num_classes = measured("way"), own["protocol"]["num_classes"]
    assert list(ways) == [way for way in (2, 3, 4, 5, 7, 10, 15, 20) if way <= num_classes]
    assert ways[5] == own["protocol_id"] == measured("way", "5,3")[5]
    assert list(measured("shot", "10,1,2")) == [1, 2, 10]
    with pytest.raises(UserError, match=f"way={num_classes + 1}"):
        measured("way", f"5,{num_classes + 1}")
    for curve, points in (("shot", "0,1"), ("way", "1"), ("shot", "1,x"), ("shot", ",")):
        with pytest.raises(UserError, match=f"at={points}: should be numbers of at least [12]"):
            measured(curve, points)
    with pytest.raises(UserError, match="at=1: belongs to a curve; add curve=shot"):
        measured(None, "1")
    maml = run("b", "algo=maml")
    with pytest.raises(UserError, match="curve=way: the run distinguishes 5 classes"):
        evaluate(maml, [], "test", "way", console)
    evaluate(maml, [], "test", "steps", console, "3,0")
    rows = next((maml / "evaluations").glob("*_steps_curve.csv")).read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["steps", "0", "3"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["protonet", "baseline"])
def test_all_classes_of_another_dataset_can_be_tested(run, console, tmp_path, name):
    for number in range(5):  # too few classes to train on
        (tmp_path / f"letters/{number}").mkdir(parents=True)
        for image in range(6):
            level = np.full((16, 16), 50 * number + image, np.uint8)
            Image.fromarray(level).save(tmp_path / f"letters/{number}/{image}.png")
    folder = run("a", f"algo={name}")
    other = ["dataset=folder", f"dataset.path={tmp_path}/letters"]
    same_shape = ["dataset.colour=grey", "dataset.image_size=16"]
    evaluate(folder, [*same_shape, *other[::-1]], "all", None, console)  # in any order
    evaluation = only_evaluation(folder, statistics="query")
    assert evaluation["split"] == "all" and evaluation["protocol"]["num_classes"] == 5
    classes = folder / "evaluations" / f"{evaluation['protocol_id']}_classes.csv"
    assert len(classes.read_text().splitlines()) == 6
    compare([folder], None, console)
    lines = list(csv.DictReader((folder / "comparison.csv").open()))
    assert {(line["dataset"], line["split"]) for line in lines[1:]} == {("folder letters", "all")}
    for overrides in ([], ["dataset.jitter=0.6"]):
        with pytest.raises(UserError, match="split=all: the run was trained on classes of this"):
            evaluate(folder, overrides, "all", None, console)
    if name == "baseline":  # colours are converted; its classifier has a weight for each feature
        other += ["dataset.colour=rgb", "dataset.image_size=32"]
        with pytest.raises(UserError, match=r"its images are 1x32x32, but .* on 1x16x16; use"):
            evaluate(folder, other, "all", None, console)


def test_all_classes_are_those_of_the_three_splits(tmp_path):
    def opened(*overrides):
        words = ["dataset=gaussians", "dataset.num_classes=12", *overrides]
        settings = checking.check_config(composition.compose_config(words)).dataset
        return components.make(settings, "dataset").open(tmp_path, tmp_path, torch.device("cpu"))

    data = opened()
    index = data.views["test"].index  # classes of different sizes have rows of different lengths
    data.views["test"] = ClassView(ClassIndex(index.rows[:, :-2], index.counts - 2, index.names))
    everything = data.with_split("all")
    names = everything.class_names("all")
    assert names == tuple(sorted(names)) and everything.num_classes("all") == 12
    merged = everything.views["all"].index
    for view in data.views.values():
        for row, count, name in zip(
            view.index.rows, view.index.counts, view.index.names, strict=True
        ):
            place = names.index(name)
            assert merged.counts[place] == count
            assert torch.equal(merged.rows[place, :count], row[:count])
    hashes = [
        opened(f"dataset.split_seed={seed}").with_split("all").protocol("all") for seed in (1, 2)
    ]
    assert hashes[0]["classes"] == hashes[1]["classes"] and hashes[0]["split"] == hashes[1]["split"]

    index = dataclasses.replace(data.views["val"].index, rows=data.views["train"].index.rows[:2])
    data.views["val"] = ClassView(index)  # as if each split numbered its own inputs
    with pytest.raises(UserError, match="stored apart"):
        data.with_split("all")


@pytest.mark.slow
def test_compare_groups_seeds_and_keeps_protocols_apart(run, console, tmp_path):
    for seed in (0, 1):
        run(f"runs/maml-{seed}", "algo=maml", f"seed={seed}", "test.episodes=20")
        run(
            f"runs/slow-{seed}",
            "algo=maml",
            f"seed={seed}",
            "algo.inner_lr=0.001",
            "test.episodes=20",
        )
    other = run("runs/protonet", "algo=protonet", "test.episodes=20")
    evaluate(other, ["statistics=query"], "test", None, console)
    compare([tmp_path / "runs"], None, console)
    text = (tmp_path / "runs/comparison.md").read_text()
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    head, rows = table[0], table[2:]
    assert len(rows) == 3  # two seeds share a row
    assert head[:3] == ["method", "seeds", "minutes"]
    # Query for all methods, and population for ProtoNet only; columns are sorted.
    assert [name.split(", ")[:3] for name in head[3:]] == [
        ["glyphs", "5w 1s 3q", statistics] for statistics in ("population", "query")
    ]
    by_name = {row[0]: row for row in rows}
    fast, slow = (by_name[f"maml glyphs algo.inner_lr={rate}"] for rate in ("0.4", "0.001"))
    assert fast[1] == slow[1] == "2"
    assert by_name["protonet glyphs"][1] == "1"
    column = next(number for number, name in enumerate(head) if ", query, " in name)
    means = [
        json.loads((tmp_path / f"runs/maml-{seed}/result.json").read_text())["test"]["accuracy"][
            "mean"
        ]
        for seed in (0, 1)
    ]
    assert fast[column].startswith(f"{100 * sum(means) / 2:.2f}%")
    assert "seeds ±" in fast[column]
    assert "seeds ±" not in by_name["protonet glyphs"][column]
    hardware = json.loads((other / "result.json").read_text())["environment"]["hardware"]
    assert f"trained on {hardware}" in text
    # Significance tests use scores averaged over seeds, adjusted for three pairs.
    scores = [
        torch.stack(
            [read_scores(tmp_path / f"runs/{name}-{seed}/test_scores.csv") for seed in (0, 1)]
        ).mean(0)
        for name in ("maml", "slow")
    ]
    assert f"{100 * estimate(scores[0]).ci95:.2f}%" in fast[column]
    assert "p adjusted for 3 comparisons (Holm)" in text
    difference = paired_difference(scores[1], scores[0])
    assert difference.p_value < 0.001  # the slow rate does not adapt at all
    (line,) = [
        line for line in text.splitlines() if line.startswith("-   maml glyphs algo.inner_lr=0.001")
    ]
    assert (
        f"{100 * difference.mean:+.2f} ± {100 * difference.ci95:.2f} points (p < 0.001), "
        "over seeds p = " in line
    )
    assert "with one seed, a significant difference" in text  # ProtoNet has one seed
    lines = list(csv.DictReader((tmp_path / "runs/comparison.csv").open()))
    assert len(lines) == 6
    assert {(line["dataset"], line["split"]) for line in lines} == {("glyphs", "test")}
    assert (tmp_path / "runs/comparison.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no finished run"):
        compare([tmp_path / "empty"], None, console)


@pytest.mark.slow
def test_compare_separates_different_trainings_and_counts_a_repeated_seed_once(
    run, console, tmp_path
):
    for name, statistics in (("a", "query"), ("b", "query"), ("c", "support")):
        folder = run(f"runs/{name}", "algo=maml", f"statistics={statistics}", "test.episodes=20")
        evaluate(folder, [], "test", None, console)
    compare([tmp_path / "runs"], None, console)
    lines = [
        line
        for line in (tmp_path / "runs/comparison.md").read_text().splitlines()
        if line.startswith("| maml")
    ]
    assert [line.split("|")[1].strip() for line in lines] == [
        "maml glyphs statistics=query",
        "maml glyphs statistics=support",
    ]
    assert [line.split("|")[2].strip() for line in lines] == ["1", "1"]
    assert "seeds ±" not in lines[0]


@pytest.mark.slow
def test_compare_lists_runs_that_it_cannot_read(run, console, tmp_path):
    run("runs/good", "algo=maml", "test.episodes=20")
    for name in ("truncated", "empty", "list", "foreign"):
        run(f"runs/{name}", "algo=maml", "test.episodes=20")
    (tmp_path / "runs/truncated/test_scores.csv").write_text("episode,accuracy\n0,0.5\n")
    (tmp_path / "runs/foreign/test_scores.csv").write_text("episode,accuracy\n" + "0,0.01\n" * 20)
    (tmp_path / "runs/empty/config.yaml").write_text("")
    (tmp_path / "runs/list/result.json").write_text("[1]")
    (tmp_path / "runs/unfinished").mkdir()
    (tmp_path / "runs/unfinished/config.yaml").write_text("seed: 0")
    compare([tmp_path / "runs"], None, console)
    text = console.export_text()
    for name in ("truncated", "empty", "list", "foreign", "unfinished"):
        assert f"left out: {tmp_path}/runs/{name}" in text, name
    for name in ("truncated", "empty", "list"):
        with pytest.raises(UserError, match=name):
            compare([tmp_path / "runs" / name], None, console)


@pytest.mark.slow
def test_equal_methods_do_not_differ_significantly(run, console, tmp_path):
    run("runs/a", "algo=maml", "train.lr=0.001", "test.episodes=20")
    run("runs/b", "algo=maml", "train.lr=0.0010001", "test.episodes=20")
    compare([tmp_path / "runs/a", tmp_path / "runs/b"], tmp_path / "out", console)
    text = (tmp_path / "out/comparison.md").read_text()
    assert "not significant" in text
    assert "train.lr=0.001" in text


#: Gates whose recipe has no budget=paper.
_UNKNOWN_TRAINING = ("protonet_cifar", "protonet_fc100", "r2d2_cifar", "maml_navigation")


@pytest.mark.slow
@pytest.mark.parametrize("name", gates.gates())
def test_gates_compose_at_every_budget_with_the_same_protocol(name):
    from metalearn.run import pairings

    steps, protocols = [], []
    for budget in schema.BUDGETS:
        if budget == "paper" and name.startswith(_UNKNOWN_TRAINING):
            with pytest.raises(UserError, match="has smoke, quick, day only"):
                reproduce.Recipe(name, budget)
            continue
        recipe = reproduce.Recipe(name, budget)
        assert recipe.overrides([])[:-1] == [f"experiment={name}", f"budget={budget}"]
        settings = recipe._composed  # of these words
        pairings.check(settings)
        steps.append(settings.train.steps)
        rest = {key: value for key, value in vars(settings.episode).items() if key != "train"}
        protocols.append((settings.dataset, rest, settings.statistics, settings.augment.support))
    assert steps == sorted(steps) and steps[0] <= 100
    assert all(one == protocols[0] for one in protocols)


def test_gates_of_earlier_versions_are_still_there():
    methods = ("maml", "protonet")
    shapes = ("5w1s", "5w5s", "20w1s", "20w5s")
    names = [f"{method}_omniglot_{shape}" for method in methods for shape in shapes]
    others = ["anil_omniglot_20w1s", "fomaml_omniglot_5w1s", "reptile_omniglot_5w1s"]
    assert {*names, *others} <= gates.gates().keys() <= choices.options("experiment").keys()
    one = gates.gates()["maml_omniglot_5w1s"]
    assert (one.mean, one.ci95, one.source) == (0.987, 0.004, "Finn et al. (2017), table 1")


@pytest.mark.parametrize(
    ("metric", "mean", "passes"),
    [
        ("accuracy", 0.8 - 0.01 - 0.005, True),
        ("accuracy", 0.8 - 0.01 - 0.0051, False),
        ("return", 0.79, True),  # half a point means nothing for a return or an error
        ("return", 0.789, False),
        ("mse", 0.81, True),
        ("mse", 0.811, False),
    ],
)
def test_gate_passes_down_to_its_interval_and_half_a_point(metric, mean, passes):
    gate = gates.gates()["maml_omniglot_5w1s"]
    assert dataclasses.replace(gate, metric=metric, mean=0.8, ci95=0.01).is_passed(mean) is passes


@pytest.mark.parametrize(
    ("budget", "mean", "ci95", "sampler", "code"),
    [
        # The published result is 98.7 ± 0.4, so the target is 97.8; the interval plays no part.
        ("paper", 0.978, 0.0001, SAMPLER_VERSION, 0),
        ("day", 0.978, 0.0001, SAMPLER_VERSION, 0),
        ("day", 0.9779, 0.01, SAMPLER_VERSION, 1),
        # The measured result is 90 ± 0; the upper end of the interval reaches it.
        ("quick", 0.899, 0.001, SAMPLER_VERSION, 0),
        ("quick", 0.898, 0.001, SAMPLER_VERSION, 1),
        ("quick", 0.899, 0.001, 1, 3),  # measured with a different sampler
        ("smoke", 0.99, 0.01, None, 3),  # no target
    ],
)
def test_verdict_compares_with_the_target_of_the_budget(
    budget, mean, ci95, sampler, code, tmp_path, console
):
    recipe = reproduce.Recipe("maml_omniglot_5w1s", budget)
    recipe.measured = None
    if budget == "quick":
        recipe.measured = {
            "mean": 0.9, "ci95": 0.0, "minutes": 1.0, "hardware": "", "seed": 0,
            "protocol_id": "p", "sampler": sampler,
        }  # fmt: skip
    result = Result(
        metric="accuracy",
        higher_is_better=True,
        test=Estimate(mean, ci95, 600),
        details={"worst_decile": {"mean": 0.5, "episodes": []}},
        protocol={"way": 5, "shot": 1, "query": 15, "statistics": "query"},
        protocol_id="p",
        name="a run",
        seed=0,
        environment={"hardware": ""},
        seconds=1.0,
        training={"val": {"accuracy": {"mean": 0.5, "ci95": 0.1, "episodes": 300}}},
    )
    result.write(tmp_path / "result.json")
    assert recipe.verdict(tmp_path, console) == code
    verdict = json.loads((tmp_path / "reproduction.json").read_text())
    assert verdict["passed"] is (code == 0)
    assert verdict["outcome"] == {0: "PASS", 1: "FAIL", 3: "NOT MEASURED"}[code]
    if code == 3:
        assert "not measured with this sampler" in console.export_text()
    if (budget, code) == ("quick", 0):  # a different protocol cannot pass
        result.protocol_id = "other"
        result.write(tmp_path / "result.json")
        assert recipe.verdict(tmp_path, console) == 1


@pytest.mark.slow
def test_reproduce_tests_a_run_with_the_same_training(compose, run, console):
    """The test is that of a run that is trained for it, but for the checkpoint that it chooses."""
    words = ("algo=protonet", "test.episodes=20", "episode.train.way=4")
    folder, own = run("a", *words), run("b", *words, "episode.way=3")
    recipe = reproduce.Recipe("protonet_omniglot_20w1s", "day")
    recipe._composed = checking.check_config(compose(*words, "episode.way=3"))
    assert recipe.changes(folder) == ["episode.way=3"]
    assert recipe.test(folder, [], console) == 1
    verdict = json.loads((folder / "reproduction-protonet_omniglot_20w1s.json").read_text())
    test = Result.read(folder / verdict["test"])
    assert test.protocol_id == Result.read(own / "result.json", is_own_test=True).protocol_id
    assert f"{100 * test.test.mean:.2f}%" in verdict["reason"] and not verdict["passed"]
    recipe._composed.test.when = "always"  # says what is tested, not how
    assert recipe.changes(folder) == verdict["changes"] == ["episode.way=3"]
    recipe._composed.train.patience = 9  # validation ends the training
    with pytest.raises(UserError, match=r"was trained with episode\.way=5, .* with 3"):
        recipe.changes(run("c", *words, "train.patience=9"))
    recipe._composed.train.patience = 0
    recipe._composed.budget, recipe._composed.train.lr = "smoke", 9.0
    with pytest.raises(UserError, match=r"was trained with budget=day, .* with smoke"):
        recipe.changes(folder)
    recipe._composed.budget = "day"
    with pytest.raises(UserError, match=r"was trained with train\.lr="):
        recipe.changes(folder)
    (own / "result.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        recipe.changes(own)


def test_batches_do_not_depend_on_the_shape_of_episodes(compose, run):
    words = ("algo=rfs", "test.episodes=2")
    folder = run("a", *words)
    recipe = reproduce.Recipe("rfs_cifar_fs_5w5s", "day")
    recipe._composed = checking.check_config(compose(*words, "episode.shot=2"))
    assert recipe.changes(folder) == ["episode.shot=2"]


@pytest.mark.slow
def test_reproduce_refuses_settings_that_change_the_experiment(capsys):
    recipe = reproduce.Recipe("maml_omniglot_5w1s", "smoke")
    for override in (
        "seed=3",
        "logger=none",
        "logger.name=none",
        "engine.threads=1",
        "resume=auto",
        "train.log_every=7",
    ):
        assert override in recipe.overrides([override])
    with pytest.raises(UserError, match="there is no such key; did you mean seed"):
        recipe.overrides(["sed=1"])
    for override in (
        "train.steps=5",
        "algo=protonet",
        "test.episodes=10",
        "train=null",
        "episode=5w5s",
    ):
        with pytest.raises(UserError, match="changes the experiment"):
            recipe.overrides([override])
    with pytest.raises(UserError, match="did you mean maml_omniglot_5w1s"):
        reproduce.Recipe("maml_omniglot_5w1", "smoke")
    with pytest.raises(
        UserError, match=r"budget=big: this method's recipe .* has smoke, quick, day, paper only"
    ):
        reproduce.Recipe("maml_omniglot_5w1s", "big")
    with pytest.raises(UserError, match="no such experiment"):
        reproduce.Recipe("demo", "smoke")
    with pytest.raises(UserError, match="takes the name of one experiment"):
        reproduce.main([])
