"""What evaluate, compare and reproduce do with finished runs."""

import csv
import json

import pytest
import torch
from rich.console import Console

from metalearn.cli import reproduce
from metalearn.cli.compare import compare
from metalearn.config import checking, composition, schema
from metalearn.report.result import Result
from metalearn.report.scores import read_scores
from metalearn.report.stats import estimate, paired_difference
from metalearn.run.evaluate import evaluate
from metalearn.run.train import train
from metalearn.system.errors import RunFailed, UserError
from metalearn.tasks.sampling import SAMPLER_VERSION
from metalearn.tasks.types import Estimate


@pytest.fixture
def console():
    return Console(width=160, record=True)


@pytest.fixture
def run(compose, console, tmp_path):
    """Makes a finished run in a folder of this name."""

    def made(name, *overrides):
        composed = compose(*overrides)
        algorithm = checking.checked(composed).algo["_target_"].rpartition(".")[2].lower()
        train(composed, tmp_path / name, f"{algorithm} glyphs", list(overrides), console)
        return tmp_path / name

    return made


def only(folder, **wanted):
    """The evaluation whose protocol is this."""
    found = [
        json.loads(path.read_text()) for path in sorted((folder / "evaluations").glob("*.json"))
    ]
    (one,) = [x for x in found if all(x["protocol"][key] == value for key, value in wanted.items())]
    return one


@pytest.mark.parametrize(
    ("name", "inductive"),
    [pytest.param("maml", "support", marks=pytest.mark.slow), ("protonet", "population")],
)
def test_evaluate_gives_both_statistics_on_shared_episodes(run, console, name, inductive):
    folder = run("a", f"algo={name}", "test.episodes=20")
    result = json.loads((folder / "result.json").read_text())
    evaluate(folder, [], "test", None, console)
    query, other = only(folder, statistics="query"), only(folder, statistics=inductive)
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
    # The difference is that of the means, since the episodes are the same.
    assert difference.mean == pytest.approx(
        query["test"]["accuracy"]["mean"] - other["test"]["accuracy"]["mean"], abs=1e-5
    )


@pytest.mark.slow
def test_evaluate_without_normalisation_has_one_measurement(run, console):
    folder = run("a", "algo=maml", "backbone.normalisation=none")
    evaluate(folder, [], "test", None, console)
    assert "transductive_minus_inductive" not in only(folder, statistics="none")


@pytest.mark.slow
def test_evaluate_changes_the_protocol_alone(run, console):
    folder = run("a", "algo=protonet")
    evaluate(
        folder,
        ["episode=20w1s", "episode.way=7", "episode.shot=2", "episode.query=4", "test.episodes=9"],
        "test",
        None,
        console,
    )
    found = only(folder, statistics="population")
    assert [found["protocol"][key] for key in ("way", "shot", "query")] == [7, 2, 4]
    assert found["test"]["accuracy"]["episodes"] == 9
    evaluate(
        folder,
        ["dataset=glyphs", "dataset.num_classes=50", "dataset.jitter=1", "dataset.image_size=16"],
        "test",
        None,
        console,
    )
    evaluate(folder, [], "train", None, console)
    known = [json.loads(path.read_text()) for path in (folder / "evaluations").glob("*.json")]
    assert {one["split"] for one in known} == {"train", "test"}
    assert len({one["protocol_id"] for one in known}) == 6

    for words, told in [
        (["train.steps=5"], "cannot change how the run was trained"),
        (["episode.train.way=3"], "cannot change how the run was trained"),
        (["episode.qery=5"], "there is no such key; did you mean episode.query"),
        (["statistics=median"], "should be one of query"),
    ]:
        with pytest.raises(UserError, match=told):
            evaluate(folder, words, "test", None, console)
    with pytest.raises(UserError, match="split=dev: should be one of"):
        evaluate(folder, [], "dev", None, console)
    with pytest.raises(UserError, match="curve=steps: ProtoNet does not adapt in steps"):
        evaluate(folder, [], "test", "steps", console)


@pytest.mark.slow
def test_evaluate_reads_a_run_that_is_older_than_a_setting(run, console):
    folder = run("a", "algo=maml")
    lines = (folder / "schema.yaml").read_text().splitlines()
    newer = (
        "reproduction:",
        "  pull:",
        "  halvings:",
        "  cuda_graph:",
    )  # of every run, its method, backbone and engine
    kept = [line for line in lines if not line.startswith(newer)]
    assert len(kept) == len(lines) - len(newer)
    (folder / "schema.yaml").write_text("\n".join(kept))
    (folder / "engine.json").unlink()
    evaluate(folder, [], "test", None, console)
    (folder / "schema.yaml").write_text("\n".join([*lines, "gone: 1"]))
    with pytest.raises(UserError, match=r"a/config\.yaml: gone: there is no such setting"):
        evaluate(folder, [], "test", None, console)


@pytest.mark.slow
def test_evaluate_tells_another_precision_from_the_plain_one(run, console):
    folder = run("a", "algo=protonet")
    evaluate(folder, ["engine.precision=bf16"], "test", None, console)
    assert all("-precision=bf16" in path.name for path in (folder / "evaluations").glob("*.json"))


@pytest.mark.slow
def test_other_adaptation_never_replaces_the_plain_evaluation(run, console):
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
    )  # as the run's own: no other adaptation
    assert len(list((folder / "evaluations").glob("*.json"))) == 4
    with pytest.raises(
        UserError, match=r"only training reads this; did you mean algo\.test_inner_steps"
    ):
        evaluate(folder, ["algo.inner_steps=7"], "test", None, console)
    with pytest.raises(RunFailed, match="not finite"):
        evaluate(folder, ["algo.inner_lr=1e30"], "test", None, console)


@pytest.mark.slow
def test_evaluate_refuses_classes_the_run_has_seen_however_they_are_drawn(run, console):
    folder = run("a", "algo=protonet")
    for words in (["dataset.split_seed=5"], ["dataset.split_seed=5", "dataset.jitter=1.01"]):
        with pytest.raises(UserError, match="were trained or validated on"):
            evaluate(folder, words, "test", None, console)
    evaluate(folder, ["dataset.rotations=classes"], "train", None, console)  # asked for by its name
    assert "train accuracy" in console.export_text()


@pytest.mark.slow
def test_evaluate_tells_that_the_way_is_part_of_the_weights(run, console):
    folder = run("a", "algo=maml")
    with pytest.raises(UserError, match=r"episode\.way=7: the run tells 5 classes apart"):
        evaluate(folder, ["episode.way=7"], "test", None, console)


@pytest.mark.slow
def test_a_curve_over_steps_ends_where_predictions_are_no_longer_finite(console, tmp_path):
    words = [
        "algo=maml",
        "dataset=sinusoid",
        "algo.inner_lr=1e3",
        "algo.test_inner_steps=0",
        "train.steps=0",
    ]
    small = ["val.episodes=4", "test.episodes=4", "logger=none"]
    train(composition.composed([*words, *small]), tmp_path / "wild", "wild", words, console)
    evaluate(tmp_path / "wild", [], "test", "steps", console)
    rows = (
        next((tmp_path / "wild/evaluations").glob("*_steps_curve.csv")).read_text().splitlines()[1:]
    )
    assert 1 <= len(rows) < 11
    assert "no longer finite" in console.export_text()


@pytest.mark.slow
def test_curves(run, console):
    folder = run("a", "algo=maml")
    result = json.loads((folder / "result.json").read_text())
    for curve in ("steps", "shot"):
        evaluate(folder, [], "test", curve, console)
        stem = folder / "evaluations" / f"{result['protocol_id']}_{curve}_curve"
        assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        rows = list(csv.DictReader(stem.with_suffix(".csv").open()))
        at = [int(row[curve]) for row in rows]
        # 20 drawings a class, 3 of them queries.
        assert at == (list(range(11)) if curve == "steps" else [1, 2, 3, 4, 5, 7, 10, 15])
        own = rows[
            at.index(3 if curve == "steps" else 1)
        ]  # three inner steps, one shot: as the run itself was tested
        assert float(own["mean"]) == pytest.approx(result["test"]["accuracy"]["mean"], abs=1e-5)
        assert own["protocol_id"] == result["protocol_id"]


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
    assert len(rows) == 3  # two seeds are one line
    assert head[:5] == ["algorithm", "setting", "seeds", "minutes", "hardware"]
    assert len(head[5:]) == 2  # query, and population for ProtoNet alone
    by_name = {(row[0], row[1]): row for row in rows}
    fast, slow = (by_name["maml glyphs", f"algo.inner_lr={rate}"] for rate in ("0.4", "0.001"))
    assert fast[2] == slow[2] == "2"
    assert by_name["protonet glyphs", ""][2] == "1"
    column = next(number for number, name in enumerate(head) if " query " in name)
    means = [
        json.loads((tmp_path / f"runs/maml-{seed}/result.json").read_text())["test"]["accuracy"][
            "mean"
        ]
        for seed in (0, 1)
    ]
    assert fast[column].startswith(f"{100 * sum(means) / 2:.2f}%")
    assert "seeds ±" in fast[column]
    assert "seeds ±" not in by_name["protonet glyphs", ""][column]
    # Significance, of the scores averaged over seeds, adjusted for the three pairs.
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
    assert "with one seed on a side" in text  # ProtoNet's
    lines = list(csv.DictReader((tmp_path / "runs/comparison.csv").open()))
    assert len(lines) == 6
    assert (tmp_path / "runs/comparison.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no finished run"):
        compare([tmp_path / "empty"], None, console)


@pytest.mark.slow
def test_compare_keeps_trainings_apart_and_counts_a_repeated_seed_once(run, console, tmp_path):
    for name, statistics in (("a", "query"), ("b", "query"), ("c", "support")):
        folder = run(f"runs/{name}", "algo=maml", f"statistics={statistics}", "test.episodes=20")
        evaluate(folder, [], "test", None, console)
    compare([tmp_path / "runs"], None, console)
    lines = [
        line
        for line in (tmp_path / "runs/comparison.md").read_text().splitlines()
        if line.startswith("| maml")
    ]
    assert [line.split("|")[2].strip() for line in lines] == [
        "statistics=query",
        "statistics=support",
    ]
    assert [line.split("|")[3].strip() for line in lines] == ["1", "1"]
    assert "seeds ±" not in lines[0]


@pytest.mark.slow
def test_compare_leaves_out_what_it_cannot_read_and_says_so(run, console, tmp_path):
    run("runs/good", "algo=maml", "test.episodes=20")
    for name in ("torn", "empty", "list", "foreign"):
        run(f"runs/{name}", "algo=maml", "test.episodes=20")
    (tmp_path / "runs/torn/test_scores.csv").write_text("episode,accuracy\n0,0.5\n")
    (tmp_path / "runs/foreign/test_scores.csv").write_text("episode,accuracy\n" + "0,0.01\n" * 20)
    (tmp_path / "runs/empty/schema.yaml").write_text("")
    (tmp_path / "runs/list/result.json").write_text("[1]")
    (tmp_path / "runs/unfinished").mkdir()
    (tmp_path / "runs/unfinished/schema.yaml").write_text("seed: 0")
    compare([tmp_path / "runs"], None, console)
    text = console.export_text()
    for name in ("torn", "empty", "list", "foreign", "unfinished"):
        assert f"left out: {tmp_path}/runs/{name}" in text, name
    for name in ("torn", "empty", "list"):
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


@pytest.mark.slow
@pytest.mark.parametrize("name", composition.reproductions())
def test_recipes_compose_at_every_budget(name):
    from metalearn.config import composition
    from metalearn.run import pairings

    for budget in ("smoke", "quick", "paper"):
        settings = checking.checked(
            composition.composed(reproduce.Recipe(name, budget).overrides([])[:-1])
        )
        pairings.check(settings)
        assert settings.reproduction is not None
        assert 0.5 < settings.reproduction.published.mean < 1
    header = (composition.conf_dir() / "experiment" / f"{name}.yaml").read_text()
    for part in (
        "# Paper: ",
        f"# Command: metalearn reproduce {name} budget=paper",
        "# Departures from the authors: ",
    ):
        assert part in header


@pytest.mark.parametrize(
    ("budget", "mean", "ci95", "sampler", "code"),
    [
        (
            "paper",
            0.9829,
            0.0001,
            SAMPLER_VERSION,
            0,
        ),  # published 98.7 ± 0.4: 98.3 is what must be reached
        ("paper", 0.9828, 0.0001, SAMPLER_VERSION, 1),
        (
            "quick",
            0.899,
            0.001,
            SAMPLER_VERSION,
            0,
        ),  # measured 90 ± 0: reached by the upper end of the interval
        ("quick", 0.898, 0.001, SAMPLER_VERSION, 1),
        ("quick", 0.899, 0.001, 1, 3),  # on other episodes
        ("smoke", 0.99, 0.01, None, 3),  # nothing to hold against
    ],
)
def test_verdict(budget, mean, ci95, sampler, code, tmp_path, console):
    recipe = reproduce.Recipe("maml_omniglot_5w1s", budget)
    recipe.measured = None
    if budget == "quick":
        recipe.measured = schema.MeasuredConfig(
            mean=0.9,
            ci95=0.0,
            minutes=1.0,
            hardware="",
            commit=None,
            seed=0,
            protocol_id="p",
            sampler=sampler,
        )
    result = Result(
        metric="accuracy",
        higher_is_better=True,
        test=Estimate(mean, ci95, 600),
        details={},
        protocol={},
        protocol_id="p",
        name="a run",
        seed=0,
        environment={},
        seconds=1.0,
    )
    result.write(tmp_path / "result.json")
    assert recipe.verdict(tmp_path, console) == code
    verdict = json.loads((tmp_path / "reproduction.json").read_text())
    assert verdict["passed"] is (code == 0)
    assert verdict["outcome"] == {0: "PASS", 1: "FAIL", 3: "NOT MEASURED"}[code]
    if code == 3:
        assert "not measured with this sampler" in console.export_text()
    if (budget, code) == ("quick", 0):  # another protocol is no confirmation
        result.protocol_id = "other"
        result.write(tmp_path / "result.json")
        assert recipe.verdict(tmp_path, console) == 1


def test_reproduce_refuses_what_makes_another_experiment(capsys):
    recipe = reproduce.Recipe("maml_omniglot_5w1s", "smoke")
    for word in (
        "seed=3",
        "logger=none",
        "logger.name=none",
        "engine.threads=1",
        "resume=auto",
        "train.log_every=7",
    ):
        assert word in recipe.overrides([word])
    with pytest.raises(UserError, match="there is no such key; did you mean seed"):
        recipe.overrides(["sed=1"])
    for word in (
        "train.steps=5",
        "algo=protonet",
        "test.episodes=10",
        "train=null",
        "episode=5w5s",
    ):
        with pytest.raises(UserError, match="changes the experiment"):
            recipe.overrides([word])
    with pytest.raises(UserError, match="did you mean maml_omniglot_5w1s"):
        reproduce.Recipe("maml_omniglot_5w1", "smoke")
    with pytest.raises(UserError, match="should be one of smoke, quick, paper"):
        reproduce.Recipe("maml_omniglot_5w1s", "big")
    with pytest.raises(UserError, match="no such experiment"):
        reproduce.Recipe("demo", "smoke")
    with pytest.raises(UserError, match="takes the name of one experiment"):
        reproduce.main([])
