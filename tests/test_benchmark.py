"""scripts/benchmark.py and scripts/results.py: the table of gates and the log of tests."""

import json
from types import SimpleNamespace
from typing import Any

import benchmark
import pytest
import results

from metalearn.system.errors import UserError


def run(experiment, budget, seed, mean):
    """Return the content of a result file."""
    result = {
        "name": "maml omniglot", "seed": seed, "seconds": 1800.0, "protocol_id": "p",
        "test": {"accuracy": {"mean": mean, "ci95": 0.002, "episodes": 10_000}},
        "protocol": {"sampler": 2}, "environment": {"commit": "c", "hardware": "a CPU"},
    }  # fmt: skip
    return {"result": result, "reproduction": {"experiment": experiment, "budget": budget}}


def row(*runs):
    rows = {one["gate"]: one for one in results.gate_rows(list(runs))}
    return rows["`maml_omniglot_5w1s`"]


def test_gate_is_judged_by_the_mean_over_seeds():
    # Published: 98.7 ± 0.4, so the mean must reach 97.8.
    one = run("maml_omniglot_5w1s", "day", 0, 0.9770)
    assert row(one)["verdict"] == "FAIL" and row(one)["over seeds"] == ""
    both = row(one, run("maml_omniglot_5w1s", "day", 1, 0.9792))
    assert (both["verdict"], both["seeds"], both["hours"]) == ("PASS", "0, 1", "1.00")
    assert both["here"] == "97.81% ± 0.20%"
    assert both["over seeds"] == "± 1.40%"  # t with one degree of freedom: 12.71 * 0.11


def test_smaller_budgets_have_no_verdict_and_do_not_count():
    quick = run("maml_omniglot_5w1s", "quick", 0, 0.99)
    assert row(quick)["verdict"] == row()["verdict"] == "not run"
    shown = row(quick, run("maml_omniglot_5w1s", "day", 0, 0.9))
    assert (shown["verdict"], shown["here"], shown["budget"]) == ("FAIL", "90.00% ± 0.20%", "day")
    assert row()["command"] == "`metalearn reproduce maml_omniglot_5w1s budget=day`"


@pytest.mark.parametrize("split", ["test", "val"])
def test_every_test_of_a_gate_is_logged_once(split, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "_RESULTS", tmp_path / "results")
    folder = tmp_path / "run"
    (folder / "evaluations").mkdir(parents=True)
    content = run("maml_omniglot_5w1s", "day", 0, 0.98)
    again = {**content["result"], "overrides": ["episode.shot=5"], "split": split}
    (folder / "result.json").write_text(json.dumps({**content["result"], "command": "c"}))
    (folder / "evaluations/p.json").write_text(json.dumps(again))
    (folder / "reproduction.json").write_text(json.dumps(content["reproduction"]))
    for _ in range(2):
        results.collect(folder, measured=False)
    content["result"]["seconds"] = 900.0  # trained and tested again
    (folder / "result.json").write_text(json.dumps({**content["result"], "command": "c"}))
    results.collect(folder, measured=False)
    lines = [json.loads(line) for line in (tmp_path / "results/tests.jsonl").open()]
    assert [line["seconds"] for line in lines] == [1800.0, *[1800.0] * (split == "test"), 900.0]
    assert {line["experiment"] for line in lines} == {"maml_omniglot_5w1s"}


def test_gate_tested_with_the_run_of_another_counts_its_training(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "_RESULTS", tmp_path / "results")
    folder = tmp_path / "run"
    (folder / "evaluations").mkdir(parents=True)
    own = run("protonet_omniglot_5w1s", "day", 0, 0.988)
    other = run("protonet_omniglot_20w1s", "day", 0, 0.96)
    test = {**other["result"], "seconds": 9.0, "protocol_id": "q"}
    more = {**other["reproduction"], "test": "evaluations/q.json", "run": "protonet_omniglot_5w1s"}
    (folder / "evaluations/q.json").write_text(json.dumps(test))
    (folder / "result.json").write_text(json.dumps({**own["result"], "command": "c"}))
    (folder / "reproduction.json").write_text(json.dumps(own["reproduction"]))
    (folder / "reproduction-protonet_omniglot_20w1s.json").write_text(json.dumps(more))
    results.collect(folder, measured=False)
    files = sorted((tmp_path / "results").glob("*.json"))
    rows = {
        one["gate"]: one for one in results.gate_rows([json.loads(f.read_text()) for f in files])
    }
    first, second = (rows[f"`protonet_omniglot_{shape}`"] for shape in ("5w1s", "20w1s"))
    assert (first["here"], second["here"]) == ("98.80% ± 0.20%", "96.00% ± 0.20%")
    assert (first["protocol"], second["protocol"]) == ("p", "q")
    assert first["hours"] == second["hours"] == "0.50"
    assert first["command"].endswith("day`") and second["command"].endswith(
        "run=<protonet_omniglot_5w1s>`"
    )
    lines = [json.loads(line) for line in (tmp_path / "results/tests.jsonl").open()]
    assert [(line["experiment"], line["seconds"]) for line in lines] == [
        ("protonet_omniglot_20w1s", 9.0), ("protonet_omniglot_5w1s", 1800.0)
    ]  # fmt: skip


def test_gate_is_tested_with_a_finished_run_of_the_same_training(tmp_path, monkeypatch):
    changes, commands = ["episode.way=20"], []

    def same(folder):
        if folder.name.startswith("other") or not (folder / "result.json").exists():
            raise UserError("another training, or not finished")
        return list(changes)

    def command(words):
        commands.append(words[3:])
        own = next(word for word in words if "=" in word and "/" in word).partition("=")[2]
        name = "reproduction-gate.json" if f"run={own}" in words else "reproduction.json"
        verdict = {"outcome": "PASS", "changes": list(changes)}
        (tmp_path / own).mkdir(exist_ok=True)
        (tmp_path / own / name).write_text(json.dumps(verdict))

    monkeypatch.setattr(benchmark.subprocess, "run", command)
    monkeypatch.setattr(benchmark, "make_room", lambda folder, overrides: None)
    recipe: Any = SimpleNamespace(name="gate", budget="day", overrides=list, changes=same)
    for name in ("other-seed0", "first-seed0", "started-seed1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
        if name != "started-seed1":
            (tmp_path / name / "result.json").touch()
    test = ["reproduce", "gate", "budget=day", f"run={tmp_path / 'first-seed0'}"]
    for _ in range(2):  # once
        verdict = benchmark.run(recipe, tmp_path / "gate-seed0", {"seed": "0"})
        assert verdict == tmp_path / "first-seed0/reproduction-gate.json"
        assert commands == [test]
    changes.append("test.episodes=5")  # the protocol has changed
    benchmark.run(recipe, tmp_path / "gate-seed0", {"seed": "0"})
    assert commands == [test, test]
    verdict = benchmark.run(recipe, tmp_path / "gate-seed1", {"seed": "1"})  # trains
    assert verdict == tmp_path / "gate-seed1/reproduction.json"
    assert commands[2:] == [
        ["reproduce", "gate", "budget=day", "resume=auto",
         f"hydra.run.dir={tmp_path / 'gate-seed1'}", "seed=1"]
    ]  # fmt: skip
    (tmp_path / "gate-seed0").mkdir()
    (tmp_path / "gate-seed0/config.yaml").touch()  # has begun to train itself
    benchmark.run(recipe, tmp_path / "gate-seed0", {"seed": "0"})
    assert "resume=auto" in commands[3]
